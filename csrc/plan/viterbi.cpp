#include <algorithm>
#include <stdexcept>
#include <string>

#include "args.h"
#include "format.h"
#include "plan/builder.h"
#include "plan/plan.h"
#include "plan/tiling.h"

namespace mlx_marlin {

namespace {

constexpr uint32_t kSteps = MARLIN_TILE_SIZE;
constexpr uint32_t kForwardSimdgroups = MARLIN_MAX_THREADS / MARLIN_SIMD_SIZE;
// Trees are too small for more.
constexpr uint32_t kTracebackSimdgroups = 4;
// The way back evaluates all paths between two kept steps, a tree with 2^10 leaves at most: 2 % of the way forward, where
// 2^12 would cost 6 %.
constexpr uint32_t kTreeBits = 10;

// Even at half rates, so that all minima that are kept are of as many nodes.
uint32_t stride_of(uint32_t half_bits) {
  const uint32_t most = std::max<uint32_t>(2 * kTreeBits / half_bits, 1);
  return half_bits % 2 == 0 ? most : most / 2 * 2;
}

bool is_width(int half_bits) {
  const bool half_rate = half_bits == 3 || half_bits == 5 || half_bits == 7;
  return half_rate || (half_bits >= 2 && half_bits <= 2 * MARLIN_MAX_BITS && half_bits % 2 == 0);
}

struct Shape {
  uint32_t stride;
  uint32_t slots;
  uint64_t nodes;  // of minima that are kept

  explicit Shape(uint32_t half_bits)
      : stride(stride_of(half_bits)), slots((kSteps - 2) / stride + 1), nodes(65536u >> (half_bits / 2)) {}

  uint64_t history_bytes() const {
    return slots * nodes * 4;
  }
};

void add_pass(Plan& plan, const ViterbiCall& call, const Shape& shape, uint64_t first, uint32_t count, bool forced) {
  const auto half_bits = static_cast<uint32_t>(call.half_bits);
  MarlinViterbiArgs args{};
  args.forced = forced;
  args.rotation = forced ? 0 : kSteps / 2;
  args.stride = shape.stride;
  args.slots = shape.slots;
  // Free ends: what is wanted is the state before position 0 alone, in the middle.
  args.first_kept = forced ? 0 : (kSteps / 2 - 1) / shape.stride * shape.stride - 1;
  // Those of the level below the leaves, and as many above them.
  args.tree_nodes = std::max(2u << (half_bits * shape.stride / 2 - half_bits / 2), 2 * kTracebackSimdgroups);
  const uint64_t tile_bytes = kSteps * 4ull;
  const uint64_t path_bytes = kSteps * 2ull;
  const std::string width = std::to_string(call.half_bits);
  plan.add(Builder("viterbi<" + width + ">", kForwardSimdgroups)
               .grid(count)
               .threadgroup_bytes(static_cast<uint32_t>(std::min<uint64_t>(4 * shape.nodes, kMaxThreadgroupBytes)))
               .args(args)
               .read(1, "tiles", count * tile_bytes, first * tile_bytes)
               .read(2, "values", 65536 * 2, 0, 8)  // four at a time
               .read(3, "y", count * path_bytes, first * path_bytes)
               .write(4, "history", count * shape.history_bytes())
               .done());
  plan.add(Builder("traceback<" + width + ", " + std::to_string(call.codebook) + ">", kTracebackSimdgroups)
               .grid(count)
               .threadgroup_bytes(args.tree_nodes * 5)
               .args(args)
               .read(1, "tiles", count * tile_bytes, first * tile_bytes)
               .read(2, "history", count * shape.history_bytes())
               .write(3, "y", count * path_bytes, first * path_bytes)
               .done());
}

}  // namespace

Plan plan_viterbi(const ViterbiCall& call, int64_t tiles, uint64_t history_bytes) {
  if (!is_width(call.half_bits) || call.codebook < MARLIN_CODEBOOK_3INST || call.codebook > MARLIN_CODEBOOK_MUL1 ||
      tiles < 0) {
    throw std::invalid_argument(
        "[plan] a search has a width, a codebook and 0 tiles or more; got " + std::to_string(call.half_bits) +
        " half bits, codebook " + std::to_string(call.codebook) + " and " + std::to_string(tiles) + " tiles.");
  }
  const Shape shape(static_cast<uint32_t>(call.half_bits));
  const auto count = static_cast<uint64_t>(tiles);
  // Equal parts: a small last one would leave cores idle.
  const uint64_t parts = ceil_div(count, std::max<uint64_t>(history_bytes / shape.history_bytes(), 1));
  Plan plan;
  for (uint64_t part = 0; part < parts; ++part) {
    const uint64_t first = part * count / parts;
    const auto size = static_cast<uint32_t>((part + 1) * count / parts - first);
    plan.reserve("history", size * shape.history_bytes());
    add_pass(plan, call, shape, first, size, false);
    add_pass(plan, call, shape, first, size, true);
  }
  return plan;
}

}  // namespace mlx_marlin
