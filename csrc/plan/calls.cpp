#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "args.h"
#include "plan/builder.h"
#include "plan/plan.h"
#include "plan/stages.h"

namespace mlx_marlin {

namespace {

// Rows are taken in passes whose scratch stays below this: about 600 tokens of Qwen3-30B-A3B. MLX keeps up to ten
// layers' scratch until their command buffers have finished.
constexpr uint64_t kScratchBytes = 1ull << 27;

// A pass is a multiple of this many rows, so that no pass but the last leaves a row tile incomplete, except one of 48.
constexpr uint64_t kPassRows = 64;

uint64_t rows_per_pass(uint64_t bytes_per_row) {
  return std::max<uint64_t>(kScratchBytes / bytes_per_row / kPassRows, 1) * kPassRows;
}

template <class AddPass>
void for_passes(Pass pass, int64_t rows, uint64_t bytes_per_row, const AddPass& add_pass) {
  // Passes of like size: a short last one would decode every expert for few rows.
  const auto all = static_cast<uint64_t>(rows);
  const uint64_t passes = ceil_div(all, rows_per_pass(bytes_per_row));
  const uint64_t step = passes ? ceil_div(ceil_div(all, passes), kPassRows) * kPassRows : 1;
  for (uint64_t first = 0; first < all; first += step) {
    pass.first_row = first;
    const uint64_t left = all - first;
    pass.rows = static_cast<uint32_t>(std::min(step, left));
    add_pass(pass);
  }
}

bool can_route(const Pass& pass) {
  return (pass.buckets() * 4ull + 1) * 4 <= kMaxThreadgroupBytes;
}

void check_route(const Pass& pass) {
  if (!can_route(pass)) {
    throw std::invalid_argument(
        "[plan] " + std::to_string(pass.experts) + " experts are too many to be sorted in threadgroup memory.");
  }
}

// On the accelerators two halves stand for a float, except where the result keeps 8 bits: the 11 of one half are enough.
bool takes_halves(const KernelConfig& config, const Tiling& tiling, int dtype) {
  return !config.use_fp32_acc || (tiling.accelerator && dtype == MARLIN_DTYPE_BFLOAT16);
}

void check_sizes(int64_t rows, int slots_per_row, int experts) {
  if (rows < 0 || slots_per_row < 1 || experts < 1) {
    throw std::invalid_argument(
        "[plan] a call has 0 rows or more, 1 slot per row or more and 1 expert or more; got " + std::to_string(rows) +
        ", " + std::to_string(slots_per_row) + " and " + std::to_string(experts) + ".");
  }
}

}  // namespace

Plan plan_linear(const LinearCall& call, int64_t rows, int dtype) {
  check_sizes(rows, call.gathered ? call.x_divisor : 1, call.stack.experts);
  Weights weights{"weight", call.stack, call.transposed};
  KernelConfig config = call.config;
  Pass pass{};
  pass.experts = static_cast<uint32_t>(call.stack.experts);
  if (call.transposed) {
    std::swap(weights.info.k, weights.info.n);
    // The matrix kernels do not transpose, and rows of more experts than can be sorted come one by one.
    const bool several_rows = !call.gathered || can_route(pass);
    config = {several_rows ? Variant::prefill4 : Variant::decode, several_rows ? 4 : 1, 128, config.simdgroups, true};
  }
  const StackInfo& info = weights.info;
  const Tiling tiling = make_tiling(config, 1, info.k, info.n);
  pass.dtype = dtype;
  pass.slots_per_row = static_cast<uint32_t>(call.gathered ? call.x_divisor : 1);
  pass.indexed = call.gathered;
  pass.routed = call.gathered && tiling.rows > 1;
  pass.fragments = tiling.matrix && !tiling.accelerator;
  pass.accelerator = tiling.accelerator;
  pass.halves = takes_halves(config, tiling, dtype);
  pass.tile_rows = static_cast<uint32_t>(tiling.rows);
  if (pass.routed) {
    check_route(pass);
  }
  const bool rotated = !rotates_itself(config, tiling, 1, info.k);
  const bool raw = !tiling.whole_blocks();
  const uint32_t in_columns = static_cast<uint32_t>(call.x_size());
  const uint32_t out_columns = static_cast<uint32_t>(call.y_size());
  const uint64_t slot_bytes = rotated * operand_bytes(1, info.k, pass.halves, pass.accelerator) + raw * 4ull * info.n;
  const uint64_t row_bytes = pass.slots_per_row * (slot_bytes + 4);
  Plan plan;
  for_passes(pass, rows, row_bytes, [&](const Pass& p) {
    if (p.routed) {
      add_route(plan, p);
    }
    if (rotated) {
      add_rotate(plan, p, weights, nullptr, in_columns);
    }
    const Input input = rotated ? Input::rotated : Input::x;
    add_linear(plan, p, {weights, tiling, in_columns, out_columns, input, raw, !raw});
    if (raw) {
      add_combine(plan, p, {weights, out_columns, 1, true, false});
    }
  });
  return plan;
}

Plan plan_swiglu(const SwigluCall& call, int64_t rows, int top_k, int dtype) {
  check_sizes(rows, top_k, call.up.experts);
  const int side_by_side = call.side_by_side();
  const Tiling tiling = make_tiling(call.config, side_by_side, call.up.k, call.up.n);
  const Tiling down_tiling = make_tiling(call.config, 1, call.down.k, call.down.n);
  const bool routed = tiling.rows > 1;
  Pass pass{};
  pass.dtype = dtype;
  pass.slots_per_row = static_cast<uint32_t>(top_k);
  pass.experts = static_cast<uint32_t>(call.up.experts);
  pass.indexed = true;
  pass.routed = routed;
  pass.fragments = tiling.matrix && !tiling.accelerator;
  pass.accelerator = tiling.accelerator;
  pass.halves = takes_halves(call.config, tiling, dtype);
  pass.tile_rows = static_cast<uint32_t>(tiling.rows);
  if (routed) {
    check_route(pass);
  }
  const SideBySide reading(call);
  const Weights down{"down", call.down};
  const bool rotated = !rotates_itself(call.config, tiling, side_by_side, call.up.k);
  const bool raw = !tiling.whole_blocks();
  const bool to_slots = raw || call.combine;
  const uint32_t hidden = static_cast<uint32_t>(call.hidden);
  const bool activates = raw && makes_input(call.config, down_tiling, 1, call.down.k);
  const uint64_t slot_bytes = rotated * operand_bytes(side_by_side, call.up.k, pass.halves, pass.accelerator) +
      raw * 4ull * side_by_side * call.up.n + !activates * operand_bytes(1, call.up.n, pass.halves, pass.accelerator) +
      to_slots * 4ull * call.down.n;
  const uint64_t row_bytes = pass.slots_per_row * slot_bytes;
  Plan plan;
  for_passes(pass, rows, row_bytes, [&](const Pass& p) {
    if (routed) {
      add_route(plan, p);
    }
    if (rotated) {
      add_rotate(plan, p, reading.first, reading.gated ? &reading.up : nullptr, hidden);
    }
    add_gate_up(plan, p, call, tiling, rotated);
    if (raw && !activates) {
      add_activate(plan, p, call);
    }
    const uint32_t inter = static_cast<uint32_t>(call.down.k);
    const Input input = activates ? Input::sums : Input::activated;
    add_linear(plan, p, {down, down_tiling, inter, hidden, input, raw, !to_slots, &call});
    if (to_slots) {
      add_combine(plan, p, {down, hidden, call.combine ? uint32_t(top_k) : 1u, raw, call.combine});
    }
  });
  return plan;
}

}  // namespace mlx_marlin
