#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/segments.h"
#include "cpu/tier.h"

namespace mlx_marlin::cpu {

namespace {

Scratch& call_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

const uint16_t* expert_row(const uint16_t* data, int expert, int size) {
  return data + static_cast<int64_t>(expert) * size;
}

// One product: the sizes seen from x to y, whichever way the matrix is used.
struct Product {
  const ProductArgs& args;
  const Config& config;
  const Tier& tier;
  int in, out;                    // padded
  int64_t row;                    // floats that a row of rotated x takes
  int in_features, out_features;  // logical
  const uint16_t* in_scale;
  const uint16_t* out_scale;

  Product(const ProductArgs& args, const Config& config)
      : args(args),
        config(config),
        tier(cpu::tier()),
        in(args.transposed ? args.stack.n : args.stack.k),
        out(args.transposed ? args.stack.k : args.stack.n),
        row(args.transposed ? in : row_floats(tier, config, in)),
        in_features(args.transposed ? args.out_features : args.in_features),
        out_features(args.transposed ? args.in_features : args.out_features),
        in_scale(args.transposed ? args.stack.svh : args.stack.suh),
        out_scale(args.transposed ? args.stack.suh : args.stack.svh) {}

  // Row `at` - segment.begin of a segment; rotated: the segment's.
  void rotate(const Segment& segment, int64_t at, int64_t slot, float* rotated) const {
    const char* x = static_cast<const char*>(args.x) + slot / args.x_divisor * in_features * dtype_bytes(args.dtype);
    const uint16_t* scale = expert_row(in_scale, segment.expert, in);
    const int index = static_cast<int>(at - segment.begin);
    if (args.transposed) {
      tier.rotate(args.dtype, x, in_features, scale, in, rotated + index * row);
    } else {
      arithmetic(tier, config, args.stack, segment.expert)
          .rotate(args.dtype, x, in_features, scale, in, {rotated, segment.rows, index, in, 0, config.panel_rows});
    }
  }

  // Columns [column, column + columns) of a segment's rows.
  void columns(const Segment& segment, const int64_t* order, float* rotated, int column, int columns) const {
    const Stack& stack = args.stack;
    Codes codes = expert_codes(stack, segment.expert);
    const Arithmetic& way = arithmetic(tier, config, stack, segment.expert);
    float* y = task_scratch().floats(
        static_cast<int64_t>(segment.rows) * columns + way.multiply_scratch(segment.rows, columns));
    if (args.transposed) {
      tier.multiply_transposed(codes, rotated, segment.rows, column, columns, y, columns);
    } else {
      way.multiply(
          codes, rotated, segment.rows, column, columns, config.panel_rows, y, columns,
          y + static_cast<int64_t>(segment.rows) * columns);
    }
    const float* bias =
        args.transposed || !stack.bias ? nullptr : stack.bias + static_cast<int64_t>(segment.expert) * out + column;
    const uint16_t* scale = expert_row(out_scale, segment.expert, out) + column;
    int written = std::min(columns, out_features - column);
    for (int r = 0; r < segment.rows; ++r, y += columns) {
      for (int c = 0; c < columns; c += MARLIN_HADAMARD_SIZE) {
        tier.finish(y + c, scale + c, bias ? bias + c : nullptr);
      }
      int64_t at = order[segment.begin + r] * out_features + column;
      tier.store(args.dtype, y, written, static_cast<char*>(args.y) + at * dtype_bytes(args.dtype));
    }
  }
};

}  // namespace

void product(const ProductArgs& args, const Config& config) {
  if (args.rows == 0) {
    return;
  }
  Product product(args, config);
  Segments segments(args.ids, args.rows, args.stack.experts, segment_rows(config));
  int64_t max_rows = std::max<int64_t>(1, kBatchBytes / (4 * product.row));
  auto batches = make_batches(segments.list, max_rows);
  int64_t most = 0;
  for (const Batch& batch : batches) {
    most = std::max(most, batch.rows);
  }
  float* rotated = call_scratch().floats(most * product.row);

  const int block = block_columns(config, product.out);
  const int blocks = (product.out + block - 1) / block;
  std::vector<Phase> phases;
  for (const Batch& batch : batches) {
    phases.push_back({batch.rows, [&, batch](int64_t task) {
                        int64_t at = batch.begin + task;
                        const Segment& segment = segments.list[segments.segment[at]];
                        product.rotate(
                            segment, at, segments.order[at], rotated + (segment.begin - batch.begin) * product.row);
                      }});
    phases.push_back({(batch.last - batch.first) * blocks, [&, batch](int64_t task) {
                        const Segment& segment = segments.list[batch.first + task / blocks];
                        int column = static_cast<int>(task % blocks) * block;
                        float* x = rotated + (segment.begin - batch.begin) * product.row;
                        product.columns(
                            segment, segments.order.data(), x, column, std::min(block, product.out - column));
                      }});
  }
  run_phases(phases, config.threads);
  call_scratch().trim();
}

void decode(const Stack& stack, int expert, uint16_t* out, int threads) {
  const Tier& tier = cpu::tier();
  Codes codes = expert_codes(stack, expert);
  int64_t row = static_cast<int64_t>(MARLIN_TILE) * codes.n;
  run_phases(
      {{codes.k / MARLIN_TILE, [&](int64_t task) { tier.decode(codes, static_cast<int>(task), out + task * row); }}},
      threads);
}

int64_t find_bad_id(const uint32_t* ids, int64_t count, int experts) {
  int64_t bad = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] >= static_cast<uint32_t>(experts) && (bad < 0 || ids[i] > ids[bad])) {
      bad = i;
    }
  }
  return bad;
}

}  // namespace mlx_marlin::cpu
