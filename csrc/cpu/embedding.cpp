// Rows of a quantized token embedding: tasks are rows.
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/tier.h"

namespace mlx_marlin::cpu {

void embedding(const EmbeddingArgs& args, int threads) {
  const Tier& tier = cpu::tier();
  const int groups = (args.features + MARLIN_TILE_SIZE - 1) / MARLIN_TILE_SIZE;
  const int64_t ring = 1 + MARLIN_TILE * args.bits;
  const int64_t row_bytes = static_cast<int64_t>(args.features) * dtype_bytes(args.dtype);
  const auto row = [&](int64_t r) {
    const uint16_t* codes = args.codes + args.ids[r] * groups * ring;
    char* out = static_cast<char*>(args.out) + r * row_bytes;
    for (int g = 0; g < groups; ++g) {
      const int first = g * MARLIN_TILE_SIZE;
      const int count = args.features - first < MARLIN_TILE_SIZE ? args.features - first : MARLIN_TILE_SIZE;
      tier.embed(
          args.dtype, codes + g * ring, args.bits, args.signs + first, count,
          out + static_cast<int64_t>(first) * dtype_bytes(args.dtype));
    }
  };
  run_phases({{args.rows, row}}, threads);
}

}  // namespace mlx_marlin::cpu
