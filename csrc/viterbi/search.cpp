#include "viterbi/search.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/pool.h"
#include "format.h"
#include "viterbi/encoder.h"

namespace mlx_marlin::viterbi {
namespace {

// Those of the instruction set in use, or of the best one before it that the search has code for.
const Encoder* encoders() {
  [[maybe_unused]] const cpu::InstructionSet set = cpu::instruction_set();
#if defined(__x86_64__)
  if (set >= cpu::InstructionSet::avx512) {
    return encoders_avx512();
  }
  if (set >= cpu::InstructionSet::avx2) {
    return encoders_avx2();
  }
#elif defined(__aarch64__)
  if (set >= cpu::InstructionSet::neon) {
    return encoders_neon();
  }
#endif
  return encoders_baseline();
}

}  // namespace

void search(const float* tiles, int64_t count, const float* values, int half_bits, uint16_t* states, int threads) {
  if (half_bits < 0 || half_bits > 2 * MARLIN_MAX_BITS || encoders()[half_bits].tiles == 0) {
    throw std::invalid_argument(
        "half_bits must be twice 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7 or 8, got " + std::to_string(half_bits));
  }
  if (threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  }
  const Encoder& encoder = encoders()[half_bits];
  cpu::Scratch ordered;
  float* table = ordered.floats(encoder.table_floats);
  encoder.arrange(values, table);
  const int64_t batches = (count + encoder.tiles - 1) / encoder.tiles;
  const auto run_batch = [&](int64_t batch) {
    const int64_t first = batch * encoder.tiles;
    const int size = static_cast<int>(std::min<int64_t>(encoder.tiles, count - first));
    // Tens of megabytes, and LDLQ searches a few tiles at a time: fresh pages would cost more than the search.
    float* scratch = cpu::task_scratch().floats(encoder.scratch_floats);
    encoder.run(tiles + first * 256, size, values, table, scratch, states + first * 256);
  };
  cpu::run_phases({{batches, run_batch}}, static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(batches, 1))));
}

}  // namespace mlx_marlin::viterbi
