#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/segments.h"
#include "cpu/tier.h"

namespace mlx_marlin::cpu {

namespace {

// Columns of out that one task of the last phase sums.
constexpr int kCombineColumns = 512;

Scratch& call_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

const uint16_t* expert_row(const uint16_t* data, int expert, int size) {
  return data + static_cast<int64_t>(expert) * size;
}

const float* expert_bias(const Stack& stack, int expert, int column) {
  return stack.bias ? stack.bias + static_cast<int64_t>(expert) * stack.n + column : nullptr;
}

struct Swiglu {
  const SwigluArgs& args;
  const Config& config;
  const Tier& tier;
  bool gated;
  int hidden, inner;        // padded
  int64_t hidden_row;       // floats that a rotated row of `hidden` values takes
  int64_t inner_row;        // the same of `inner`
  float* gate_x = nullptr;  // [batch rows, hidden_row]: rotated for gate, if there is one
  float* up_x = nullptr;    // the same for up
  float* down_x = nullptr;  // [batch rows, inner_row]: rotated for down
  float* slots = nullptr;   // [rows * top_k, args.hidden]: what is combined, with scores
  int64_t first_slot = 0;   // of the rows that `slots` holds

  const Arithmetic& way(const Stack& stack, const Segment& segment) const {
    return arithmetic(tier, config, stack, segment.expert);
  }

  // Row `row` of a segment whose rows begin at `at` in gate_x and up_x.
  void rotate(const Segment& segment, int row, int64_t slot, int64_t at) const {
    const char* x = static_cast<const char*>(args.x) + slot / args.top_k * args.hidden * dtype_bytes(args.dtype);
    const auto rotate = [&](const Stack& stack, float* to) {
      way(stack, segment)
          .rotate(
              args.dtype, x, args.hidden, expert_row(stack.suh, segment.expert, hidden), hidden,
              {to + at * hidden_row, segment.rows, row, hidden, 0, config.panel_rows});
    };
    if (gated) {
      rotate(args.gate, gate_x);
    }
    rotate(args.up, up_x);
  }

  // `columns` columns of one projection of a segment, in the original basis.
  void project(
      const Stack& stack, const Segment& segment, float* x, int column, int columns, float* y, float* scratch) const {
    way(stack, segment)
        .multiply(
            expert_codes(stack, segment.expert), x, segment.rows, column, columns, config.panel_rows, y, columns,
            scratch);
    const uint16_t* scale = expert_row(stack.svh, segment.expert, stack.n) + column;
    const float* bias = expert_bias(stack, segment.expert, column);
    for (int64_t r = 0; r < segment.rows; ++r) {
      for (int c = 0; c < columns; c += MARLIN_HADAMARD_SIZE) {
        tier.finish(y + r * columns + c, scale + c, bias ? bias + c : nullptr);
      }
    }
  }

  // Gate, up, activation and down's input transform for columns [column, column + columns).
  void gate_up(const Segment& segment, int64_t at, int column, int columns) const {
    int64_t size = static_cast<int64_t>(segment.rows) * columns;
    int64_t scratch = way(args.up, segment).multiply_scratch(segment.rows, columns);
    if (gated) {
      scratch = std::max(scratch, way(args.gate, segment).multiply_scratch(segment.rows, columns));
    }
    float* first = task_scratch().floats((gated ? 2 : 1) * size + scratch);
    float* up = gated ? first + size : first;
    if (gated) {
      project(args.gate, segment, gate_x + at * hidden_row, column, columns, first, up + size);
    }
    project(args.up, segment, up_x + at * hidden_row, column, columns, up, up + size);
    const uint16_t* scale = expert_row(args.down.suh, segment.expert, inner) + column;
    for (int64_t r = 0; r < segment.rows; ++r) {
      float* act = first + r * columns;
      const float* factor = gated ? up + r * columns : nullptr;
      tier.activate(act, factor, columns, args.activation, args.alpha, args.limit);
      way(args.down, segment)
          .rotate(
              DType::float32, act, columns, scale, columns,
              {down_x + at * inner_row, segment.rows, static_cast<int>(r), inner, column, config.panel_rows});
    }
  }

  void down(const Segment& segment, const int64_t* order, int64_t at, int column, int columns) const {
    int64_t size = static_cast<int64_t>(segment.rows) * columns;
    float* y = task_scratch().floats(size + way(args.down, segment).multiply_scratch(segment.rows, columns));
    project(args.down, segment, down_x + at * inner_row, column, columns, y, y + size);
    int written = std::min(columns, args.hidden - column);
    for (int r = 0; r < segment.rows; ++r, y += columns) {
      int64_t slot = order[segment.begin + r];
      if (args.scores) {
        std::copy_n(y, written, slots + (slot - first_slot) * args.hidden + column);
      } else {
        char* out = static_cast<char*>(args.out);
        tier.store(args.dtype, y, written, out + (slot * args.hidden + column) * dtype_bytes(args.dtype));
      }
    }
  }

  void combine(int64_t row, int column, int columns) const {
    alignas(64) float sum[kCombineColumns] = {};
    for (int s = 0; s < args.top_k; ++s) {
      int64_t slot = row * args.top_k + s;
      tier.add_scaled(sum, slots + (slot - first_slot) * args.hidden + column, args.scores[slot], columns);
    }
    tier.store(
        args.dtype, sum, columns,
        static_cast<char*>(args.out) + (row * args.hidden + column) * dtype_bytes(args.dtype));
  }
};

// Rows [begin, begin + rows) of x.
void swiglu_rows(Swiglu& job, int64_t begin, int64_t rows) {
  const SwigluArgs& args = job.args;
  job.first_slot = begin * args.top_k;
  Segments segments(args.ids + job.first_slot, rows * args.top_k, args.up.experts, segment_rows(job.config));
  for (int64_t& slot : segments.order) {
    slot += job.first_slot;
  }
  const int64_t first_row = (job.gated ? 2 : 1) * job.hidden_row;  // of a slot's rotated x, for all that read it
  auto batches = make_batches(segments.list, std::max<int64_t>(1, kBatchBytes / (4 * (first_row + job.inner_row))));
  int64_t most = 0;
  for (const Batch& batch : batches) {
    most = std::max(most, batch.rows);
  }
  int64_t combined = args.scores ? rows * args.top_k * args.hidden : 0;
  job.gate_x = call_scratch().floats(most * (first_row + job.inner_row) + combined);
  job.down_x = job.gate_x + most * first_row;
  job.up_x = job.down_x - most * job.hidden_row;
  job.slots = job.down_x + most * job.inner_row;

  const int inner_block = block_columns(job.config, job.inner);
  const int inner_blocks = (job.inner + inner_block - 1) / inner_block;
  const int out_block = block_columns(job.config, job.hidden);
  const int out_blocks = (job.hidden + out_block - 1) / out_block;
  std::vector<Phase> phases;
  for (const Batch& batch : batches) {
    int64_t count = batch.last - batch.first;
    phases.push_back(
        {batch.rows, [&, batch](int64_t task) {
           int64_t at = batch.begin + task;
           const Segment& segment = segments.list[segments.segment[at]];
           job.rotate(segment, static_cast<int>(at - segment.begin), segments.order[at], segment.begin - batch.begin);
         }});
    phases.push_back({count * inner_blocks, [&, batch, inner_block, inner_blocks](int64_t task) {
                        const Segment& segment = segments.list[batch.first + task / inner_blocks];
                        int column = static_cast<int>(task % inner_blocks) * inner_block;
                        job.gate_up(
                            segment, segment.begin - batch.begin, column, std::min(inner_block, job.inner - column));
                      }});
    phases.push_back({count * out_blocks, [&, batch, out_block, out_blocks](int64_t task) {
                        const Segment& segment = segments.list[batch.first + task / out_blocks];
                        int column = static_cast<int>(task % out_blocks) * out_block;
                        job.down(
                            segment, segments.order.data(), segment.begin - batch.begin, column,
                            std::min(out_block, job.hidden - column));
                      }});
  }
  const int64_t present = segments.size();
  if (present < rows * args.top_k) {
    phases.push_back({rows * args.top_k - present, [&, present](int64_t task) {
                        const int64_t bytes = int64_t{args.hidden} * dtype_bytes(args.dtype);
                        std::memset(static_cast<char*>(args.out) + segments.order[present + task] * bytes, 0, bytes);
                      }});
  }
  if (args.scores) {
    int64_t parts = (args.hidden + kCombineColumns - 1) / kCombineColumns;
    phases.push_back({rows * parts, [&, begin, parts](int64_t task) {
                        int column = static_cast<int>(task % parts) * kCombineColumns;
                        job.combine(begin + task / parts, column, std::min(kCombineColumns, args.hidden - column));
                      }});
  }
  run_phases(phases, job.config.threads);
}

}  // namespace

void swiglu(const SwigluArgs& args, const Config& config) {
  const Tier& tier = cpu::tier();
  Swiglu job{
      args,
      config,
      tier,
      args.gate.codes != nullptr,
      args.up.k,
      args.up.n,
      row_floats(tier, config, args.up.k),
      row_floats(tier, config, args.up.n)};
  // With scores the outputs of all slots wait for their sum: as many rows at once as 64 MB hold.
  int64_t most = args.rows;
  if (args.scores) {
    most = std::max<int64_t>(1, (int64_t{64} << 20) / (4 * int64_t{args.top_k} * args.hidden));
  }
  for (int64_t begin = 0; begin < args.rows; begin += most) {
    swiglu_rows(job, begin, std::min(most, args.rows - begin));
  }
  call_scratch().trim();
}

}  // namespace mlx_marlin::cpu
