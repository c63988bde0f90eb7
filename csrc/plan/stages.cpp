#include "plan/stages.h"

#include <algorithm>
#include <stdexcept>

#include "args.h"
#include "format.h"
#include "plan/builder.h"

namespace mlx_marlin {

namespace {

// Threads that are not in a product: 8 simdgroups, the usual group size on these GPUs.
constexpr uint32_t kStageSimdgroups = 8;

std::string product_name(const char* stem, const Tiling& t) {
  return std::string(stem) + "<" + std::to_string(t.row_parameter()) + ", " + std::to_string(t.tiles_per_simdgroup) +
      ", " + (t.matrix ? "true" : "false") + ">";
}

MarlinProductArgs product_args(
    const Pass& pass, const StackInfo& info, const Tiling& t, uint32_t in_columns, uint32_t out_columns) {
  MarlinProductArgs args{};
  args.k = static_cast<uint32_t>(info.k);
  args.n = static_cast<uint32_t>(info.n);
  args.in_columns = in_columns;
  args.out_columns = out_columns;
  args.positions = pass.positions();
  args.experts = pass.experts;
  args.slots_per_row = pass.slots_per_row;
  args.column_tiles = static_cast<uint32_t>(t.column_tiles);
  args.k_splits = static_cast<uint32_t>(t.k_splits);
  args.k_splits_inverse = ceil_div(1u << 16, args.k_splits);
  args.split_tiles = args.k / MARLIN_TILE / args.k_splits;
  args.long_splits = args.k / MARLIN_TILE % args.k_splits;
  return args;
}

uint64_t sums_bytes(const Pass& pass, const SwigluCall& call) {
  return uint64_t(call.side_by_side()) * pass.positions() * call.up.n * 4;
}

}  // namespace

uint64_t Pass::element_size() const {
  return dtype == MARLIN_DTYPE_FLOAT32 ? 4 : 2;
}

uint32_t Pass::row_tiles() const {
  if (!routed) {
    return ceil_div(slots(), tile_rows);
  }
  // Every expert that has slots may leave one tile incomplete.
  const uint64_t incomplete = std::min(slots(), buckets());
  return static_cast<uint32_t>((slots() + incomplete * (tile_rows - 1)) / tile_rows);
}

void add_route(Plan& plan, const Pass& pass) {
  constexpr uint32_t simdgroups = MARLIN_MAX_THREADS / MARLIN_SIMD_SIZE;
  MarlinRouteArgs args{};
  args.slots = pass.slots();
  args.experts = pass.experts;
  args.tile_rows = pass.tile_rows;
  args.alignment = pass.alignment();
  args.positions = pass.positions();
  args.tiles = pass.row_tiles();
  args.scanners = std::max(1u, simdgroups * MARLIN_SIMD_SIZE / pass.buckets());
  plan.reserve("order", pass.positions() * 4ull);
  plan.reserve("row_tiles", pass.row_tiles() * sizeof(MarlinRowTile));
  plan.add(Builder("route", simdgroups)
               .grid(1)
               .threadgroup_bytes((pass.buckets() * (args.scanners + 3) + 1) * 4)
               .args(args)
               .indices(1, pass)
               .write(2, "order", pass.positions() * 4ull)
               .write(3, "row_tiles", pass.row_tiles() * sizeof(MarlinRowTile))
               .done());
}

void add_rotate(Plan& plan, const Pass& pass, const Weights& first, const Weights* second, uint32_t columns) {
  const int k = first.info.k;
  MarlinRotateArgs args{};
  args.k = static_cast<uint32_t>(k);
  args.columns = columns;
  args.positions = pass.positions();
  args.experts = pass.experts;
  if (uint64_t(pass.slots()) * pass.slots_per_row >= 1u << 31) {  // from there on the inverse is not exact
    throw std::invalid_argument(
        "[plan] " + std::to_string(pass.slots_per_row) + " slots per row are too many for a pass of " +
        std::to_string(pass.rows) + " rows.");
  }
  args.slots_per_row_inverse = ceil_div(1u << 31, pass.slots_per_row);
  const uint64_t projections = second ? 2 : 1;
  const uint64_t units = pass.position_rows() / (pass.fragments ? 8 : 1);
  const uint64_t bytes = projections * pass.rotated_bytes(k);
  // Threadgroups of equal parts of a row's blocks.
  const uint32_t blocks = static_cast<uint32_t>(k / MARLIN_HADAMARD_SIZE);
  const uint32_t simdgroups = ceil_div(blocks, ceil_div(blocks, kStageSimdgroups));
  Builder b("rotate", simdgroups);
  b.grid(static_cast<uint32_t>(units), ceil_div(blocks, simdgroups), static_cast<uint32_t>(projections))
      .args(args)
      .constant("dtype", pass.dtype)
      .constant("routed", pass.routed)
      .constant("indexed", pass.indexed)
      .constant("fragments", pass.fragments)
      .constant("gated", second != nullptr)
      .constant("half_operands", pass.halves)
      .constant("accelerator", pass.accelerator)
      .x(1, pass, columns)
      .suh(4, first)
      .write(6, "rotated", bytes);
  if (pass.indexed) {
    b.indices(2, pass);
  }
  if (pass.routed) {
    b.order(3, pass);
  }
  if (second) {
    b.suh(5, *second);
  }
  plan.reserve("rotated", bytes);
  plan.add(b.done());
}

void add_gate_up(Plan& plan, const Pass& pass, const SwigluCall& call, const Tiling& t, bool rotated) {
  const SideBySide reading(call);
  const bool gated = reading.gated, fused = t.whole_blocks();
  const Weights &first = reading.first, &up = reading.up;
  const uint32_t columns = static_cast<uint32_t>(call.hidden), projections = gated ? 2 : 1;
  MarlinProductArgs args = product_args(pass, call.up, t, columns, 0);
  args.alpha = call.alpha;
  args.limit = call.limit;
  const uint64_t copies = rotated ? 0 : operand_bytes(uint64_t(projections) * t.rows, call.up.k, pass.halves);
  Builder b(product_name("gate_up", t), t.simdgroups);
  b.grid(ceil_div(call.up.n, t.columns()), pass.row_tiles())
      .threadgroup_bytes(t.sums_bytes + static_cast<uint32_t>(copies))
      .args(args)
      .constant("widths", first.info.widths | up.info.widths)
      .constant("codebooks", first.info.codebooks | up.info.codebooks)
      .constant("activation", call.activation)
      .constant("dtype", pass.dtype)
      .constant("gated", gated)
      .constant("gated_prologue", gated && !rotated)
      .constant("gated_epilogue", gated && fused)
      .constant("first_bias", fused && first.info.bias)
      .constant("second_bias", gated && fused && up.info.bias)
      .constant("routed", pass.routed)
      .constant("indexed", !pass.routed)
      .constant("fused_prologue", !rotated)
      .constant("rotated_input", rotated)
      .constant("fused_epilogue", fused)
      .constant("raw_output", !fused)
      .constant("fragments", pass.fragments)
      .constant("half_operands", pass.halves)
      .constant("accelerator", pass.accelerator)
      .codes(6, first);
  if (rotated) {
    b.read(2, "rotated", projections * pass.rotated_bytes(call.up.k));
  } else {
    b.x(1, pass, columns).suh(9, first);
  }
  if (pass.routed) {
    b.order(4, pass).read(5, "row_tiles", pass.row_tiles() * sizeof(MarlinRowTile));
  } else {
    b.indices(3, pass);
  }
  if (fused) {
    b.svh(10, first).suh(18, {"down", call.down});
  }
  if (fused && first.info.bias) {
    b.bias(11, first);
  }
  if (gated) {
    b.codes(12, up);
    if (!rotated) {
      b.suh(15, up);
    }
    if (fused) {
      b.svh(16, up);
    }
    if (fused && up.info.bias) {
      b.bias(17, up);
    }
  }
  const std::string out = fused ? "activated" : "sums";
  const uint64_t bytes = fused ? pass.rotated_bytes(call.up.n) : sums_bytes(pass, call);
  b.write(19, out, bytes);
  plan.reserve(out, bytes);
  plan.add(b.done());
}

namespace {

// What a kernel needs to activate sums: they are at `slot`, what finishes them in the four slots from `finish` on.
void read_sums(Builder& b, const Pass& pass, const SwigluCall& call, int slot, int finish) {
  const SideBySide reading(call);
  const Weights &first = reading.first, &up = reading.up;
  const bool gated = reading.gated;
  b.constant("activation", call.activation)
      .constant("gated", gated)
      .constant("gated_epilogue", gated)
      .constant("first_bias", first.info.bias)
      .constant("second_bias", gated && up.info.bias)
      .read(slot, "sums", sums_bytes(pass, call))
      .svh(finish, first);
  if (gated) {
    b.svh(finish + 1, up);
  }
  if (first.info.bias) {
    b.bias(finish + 2, first);
  }
  if (gated && up.info.bias) {
    b.bias(finish + 3, up);
  }
}

}  // namespace

void add_activate(Plan& plan, const Pass& pass, const SwigluCall& call) {
  MarlinActivateArgs args{};
  args.n = static_cast<uint32_t>(call.up.n);
  args.positions = pass.positions();
  args.experts = pass.experts;
  args.alpha = call.alpha;
  args.limit = call.limit;
  const uint64_t blocks = static_cast<uint64_t>(call.up.n) / MARLIN_HADAMARD_SIZE;
  const uint64_t bytes = pass.rotated_bytes(call.up.n);
  Builder b("activate", kStageSimdgroups);
  b.grid(ceil_div(pass.positions() * blocks, kStageSimdgroups))
      .args(args)
      .constant("routed", pass.routed)
      .constant("fragments", pass.fragments)
      .constant("half_operands", pass.halves)
      .constant("accelerator", pass.accelerator)
      .indices(2, pass)
      .suh(8, {"down", call.down})
      .write(9, "activated", bytes);
  read_sums(b, pass, call, 1, 4);
  if (pass.routed) {
    b.order(3, pass);
  }
  plan.reserve("activated", bytes);
  plan.add(b.done());
}

namespace {

// Where a product's rows go.
void write_product(Plan& plan, Builder& b, const Pass& pass, const LinearStage& stage) {
  if (stage.to_y) {
    const uint64_t row = stage.out_columns * pass.element_size();
    b.write(12, "y", pass.slots() * row, pass.first_slot() * row);
  } else {
    const uint64_t bytes = static_cast<uint64_t>(pass.slots()) * stage.weights.info.n * 4;
    b.write(13, "slots", bytes);
    plan.reserve("slots", bytes);
  }
}

}  // namespace

void add_linear(Plan& plan, const Pass& pass, const LinearStage& stage) {
  const Tiling& t = stage.tiling;
  const StackInfo& info = stage.weights.info;
  const bool activates = stage.input == Input::sums;
  const bool local = activates || stage.input == Input::x;
  const bool bias = info.bias && !stage.raw;
  const bool indexed = pass.indexed && !pass.routed;
  const uint64_t copies = local ? operand_bytes(t.rows, info.k, pass.halves) : 0;
  MarlinProductArgs args = product_args(pass, info, t, stage.in_columns, stage.out_columns);
  Builder b(product_name("linear", t), t.simdgroups);
  b.grid(ceil_div(info.n, t.columns()), pass.row_tiles())
      .threadgroup_bytes(t.sums_bytes + static_cast<uint32_t>(copies))
      .constant("widths", info.widths)
      .constant("codebooks", info.codebooks)
      .constant("dtype", pass.dtype)
      .constant("down_bias", bias)
      .constant("routed", pass.routed)
      .constant("indexed", indexed)
      .constant("fused_prologue", stage.input == Input::x)
      .constant("activating_input", activates)
      .constant("local_input", local)
      .constant("rotated_input", !local)
      .constant("fused_epilogue", !stage.raw)
      .constant("raw_output", stage.raw)
      .constant("to_y", stage.to_y)
      .constant("transposed", stage.weights.transposed)
      .constant("to_slots", !stage.to_y)
      .constant("fragments", pass.fragments)
      .constant("half_operands", pass.halves)
      .constant("accelerator", pass.accelerator)
      .codes(6, stage.weights);
  if (local) {
    b.suh(9, stage.weights);
  } else {
    b.read(2, stage.input == Input::rotated ? "rotated" : "activated", pass.rotated_bytes(info.k));
  }
  if (stage.input == Input::x) {
    b.x(1, pass, stage.in_columns);
  }
  if (activates) {
    args.alpha = stage.call->alpha;
    args.limit = stage.call->limit;
    read_sums(b, pass, *stage.call, 14, 15);
  }
  if (indexed) {
    b.indices(3, pass);
  }
  if (pass.routed) {
    b.order(4, pass).read(5, "row_tiles", pass.row_tiles() * sizeof(MarlinRowTile));
  }
  if (!stage.raw) {
    b.svh(10, stage.weights);
  }
  if (bias) {
    b.bias(11, stage.weights);
  }
  write_product(plan, b, pass, stage);
  plan.add(b.args(args).done());
}

void add_combine(Plan& plan, const Pass& pass, const CombineStage& stage) {
  const StackInfo& info = stage.weights.info;
  const bool bias = info.bias && stage.raw;
  MarlinCombineArgs args{};
  args.n = static_cast<uint32_t>(info.n);
  args.out_columns = stage.out_columns;
  args.rows = pass.slots() / stage.slots_per_row;
  args.slots_per_row = stage.slots_per_row;
  args.experts = pass.experts;
  const uint64_t blocks = static_cast<uint64_t>(info.n) / MARLIN_HADAMARD_SIZE;
  const uint64_t row = stage.out_columns * pass.element_size();
  const uint64_t first_row = pass.first_slot() / stage.slots_per_row;
  Builder b("combine", kStageSimdgroups);
  b.grid(ceil_div(args.rows * blocks, kStageSimdgroups))
      .args(args)
      .constant("dtype", pass.dtype)
      .constant("down_bias", bias)
      .constant("indexed", pass.indexed)
      .constant("raw_output", stage.raw)
      .constant("weighted", stage.weighted)
      .read(1, "slots", static_cast<uint64_t>(pass.slots()) * info.n * 4)
      .write(6, "y", args.rows * row, first_row * row);
  if (pass.indexed) {
    b.indices(2, pass);
  }
  if (stage.weighted) {
    b.read(3, "scores", pass.slots() * 4ull, pass.first_slot() * 4);
  }
  if (stage.raw) {
    b.svh(4, stage.weights);
  }
  if (bias) {
    b.bias(5, stage.weights);
  }
  plan.add(b.done());
}

Plan plan_decode(const DecodeCall& call) {
  const StackInfo& info = call.stack;
  const Weights weights{"weight", info};
  MarlinDecodeArgs args{};
  args.n = static_cast<uint32_t>(info.n);
  args.tiles = static_cast<uint32_t>(static_cast<uint64_t>(info.k) * info.n / MARLIN_TILE_SIZE);
  args.expert = static_cast<uint32_t>(call.expert);
  Plan plan;
  plan.add(Builder("decode", kStageSimdgroups)
               .grid(ceil_div(args.tiles, kStageSimdgroups))
               .args(args)
               .constant("widths", info.widths)
               .constant("codebooks", info.codebooks)
               .codes(1, weights)
               .write(4, "y", static_cast<uint64_t>(info.k) * info.n * 2)
               .done());
  return plan;
}

Plan plan_embedding(const EmbeddingCall& call, int64_t rows, int dtype) {
  MarlinEmbeddingArgs args{};
  args.rows = static_cast<uint32_t>(call.rows);
  args.features = static_cast<uint32_t>(call.features);
  args.groups = ceil_div(call.features, MARLIN_TILE_SIZE);
  args.bits = static_cast<uint32_t>(call.bits);
  const uint64_t row_codes = 2ull * args.groups * (1 + MARLIN_TILE * args.bits);
  const uint64_t element = dtype == MARLIN_DTYPE_FLOAT32 ? 4 : 2;
  const uint32_t simdgroups = std::min<uint32_t>(args.groups, kStageSimdgroups);
  // A grid has at most 65535 threadgroups along y.
  constexpr int64_t kMostRows = 65535;
  Plan plan;
  for (int64_t first = 0; first < rows; first += kMostRows) {
    const auto count = static_cast<uint64_t>(std::min(kMostRows, rows - first));
    const uint64_t row_bytes = call.features * element;
    plan.add(Builder("embedding", simdgroups)
                 .grid(ceil_div(args.groups, simdgroups), static_cast<uint32_t>(count))
                 .args(args)
                 .constant("dtype", static_cast<uint32_t>(dtype))
                 .read(1, "indices", count * 4, first * 4)
                 .read(2, "embedding.codes", call.rows * row_codes)
                 .read(3, "embedding.signs", 2ull * args.groups * MARLIN_TILE_SIZE)
                 .write(4, "y", count * row_bytes, first * row_bytes)
                 .done());
  }
  return plan;
}

}  // namespace mlx_marlin
