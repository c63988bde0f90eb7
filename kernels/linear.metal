// Rows times one weight: a dense linear, or down with an expert per slot, whose rows may still be sums of the
// projections of x.
#include "product.h"

struct LinearFinish {
  constant MarlinProductArgs* args;
  Items items;
  RowRange rows;
  uint first_column;
  threadgroup const float* sums;
  device const uint* order;
  device const half* svh;
  device const float* biases;
  device uchar* y;
  device float* slots;
  uint simdgroup;
  uint simdgroups;
  ushort lane;

  METAL_FUNC uint slot(uint row) const thread {
    const uint position = rows.first + row;
    if (routed) {
      return order[position];
    }
    return position;
  }

  // Writes `count` rows: raw sums, or blocks of 128, one per simdgroup.
  METAL_FUNC void slice(uint first_row, uint count) const thread {
    const uint columns = min(args->column_tiles * MARLIN_TILE, args->n - first_column);
    if (raw_output) {
      for (uint row = simdgroup; row < count; row += simdgroups) {
        const ulong at = ulong(slot(first_row + row)) * args->n + first_column;
        for (uint column = lane; column < columns; column += MARLIN_SIMD_SIZE) {
          slots[at + column] = items.sum(sums, 0, column, row);
        }
      }
      return;
    }
    const uint blocks = columns / MARLIN_HADAMARD_SIZE;
    for (uint task = simdgroup; task < blocks * count; task += simdgroups) {
      const uint row = row_of_block(task, blocks);
      const uint first = (task - row * blocks) * MARLIN_HADAMARD_SIZE;
      store(first_row + row, first_column + first, items.block(sums, 0, first, row, lane));
    }
  }

  METAL_FUNC void store(uint row, uint first, float4 v) const thread {
    const ulong at = ulong(rows.expert) * args->n + first;
    device const float* bias = nullptr;
    if (down_bias) {
      bias = biases + at;
    }
    v = finish(v, svh + at, bias, down_bias, lane);
    const uint to = slot(row);
    if (to_slots) {
      device float2* pairs = (device float2*)(slots + ulong(to) * args->n + first + lane_column(lane));
      pairs[0] = v.xy;
      pairs[4] = v.zw;
    } else {
      store_row(y, to, args->out_columns, first, lane, v);
    }
  }

  // For indices out of range. Rows in scratch are left alone: combine looks at the index again.
  METAL_FUNC void store_nan() const thread {
    if (to_y) {
      const uint columns = min(args->column_tiles * MARLIN_TILE, args->n - first_column);
      const uint blocks = columns / MARLIN_HADAMARD_SIZE;
      for (uint task = simdgroup; task < blocks * rows.count; task += simdgroups) {
        const uint row = row_of_block(task, blocks);
        const uint first = first_column + (task - row * blocks) * MARLIN_HADAMARD_SIZE;
        store_row(y, slot(row), args->out_columns, first, lane, float4(NAN));
      }
    }
  }
};

// Activates the row tile's rows, [position][projection][k], into threadgroup memory, one simdgroup per 128-block. Rows
// beyond the tile's are zeros.
template <int R>
METAL_FUNC void activate_rows(
    constant MarlinProductArgs& args,
    RowRange rows,
    device const float* sums,
    SumsFinish finish_sums,
    LocalBuffer<R> to,
    uint simdgroup,
    uint simdgroups,
    ushort lane) {
  const uint blocks = args.k / MARLIN_HADAMARD_SIZE;
  for (uint task = simdgroup; task < R * blocks; task += simdgroups) {
    const uint r = row_of<R>(task, blocks);
    const uint first = (task - r * blocks) * MARLIN_HADAMARD_SIZE;
    float4 v = float4(0.0f);
    if (r < rows.count) {
      const ulong at = ulong(rows.expert) * args.k + first;
      device const float* row = sums + (gated ? 2 : 1) * ulong(rows.first + r) * args.k + first;
      const float4 second = gated ? load_floats(row + args.k, lane) : float4(0.0f);
      v = finish_sums.block(load_floats(row, lane), second, at, args.alpha, args.limit, lane);
    }
    to.store(0, task, lane, v);
  }
}

// Rows: rows of a row tile, in units of 8 if Matrix. T: adjacent column tiles per simdgroup.
template <int Rows, int T, bool Matrix>
[[kernel, max_total_threads_per_threadgroup(MARLIN_SOURCE_max_threads)]] void trellis_linear(
    constant MarlinProductArgs& args [[buffer(0)]],
    device const uchar* x [[buffer(1), function_constant(fused_prologue)]],
    device const float* rotated [[buffer(2), function_constant(rotated_input)]],
    device const uint* indices [[buffer(3), function_constant(indexed)]],
    device const uint* order [[buffer(4), function_constant(routed)]],
    device const MarlinRowTile* row_tiles [[buffer(5), function_constant(routed)]],
    device const uint* codes [[buffer(6)]],
    device const long* offsets [[buffer(7)]],
    device const uint* formats [[buffer(8)]],
    device const half* suh [[buffer(9), function_constant(local_input)]],
    device const half* svh [[buffer(10), function_constant(fused_epilogue)]],
    device const float* biases [[buffer(11), function_constant(down_bias)]],
    device uchar* y [[buffer(12), function_constant(to_y)]],
    device float* slots [[buffer(13), function_constant(to_slots)]],
    device const float* sums [[buffer(14), function_constant(activating_input)]],
    device const half* first_svh [[buffer(15), function_constant(activating_input)]],
    device const half* second_svh [[buffer(16), function_constant(gated_epilogue)]],
    device const float* first_biases [[buffer(17), function_constant(first_bias)]],
    device const float* second_biases [[buffer(18), function_constant(second_bias)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]) {
  const ushort lane = ushort(lane_index);
  LinearFinish finish_slice;
  device const uint* experts = nullptr;
  device const MarlinRowTile* tiles = nullptr;
  if (indexed) {
    experts = indices;
  }
  if (routed) {
    tiles = row_tiles;
    finish_slice.order = order;
  }
  const RowRange rows = find_rows(args, group.y, Matrix ? 8 * Rows : Rows, experts, tiles);
  if (rows.count == 0) {
    return;
  }
  if (down_bias) {
    finish_slice.biases = biases;
  }
  if (fused_epilogue) {
    finish_slice.svh = svh;
  }
  if (to_y) {
    finish_slice.y = y;
  }
  if (to_slots) {
    finish_slice.slots = slots;
  }
  finish_slice.args = &args;
  finish_slice.rows = rows;
  finish_slice.first_column = group.x * args.column_tiles * MARLIN_TILE;
  finish_slice.sums = shared;
  finish_slice.simdgroup = simdgroup;
  finish_slice.simdgroups = simdgroups;
  finish_slice.lane = lane;
  if (rows.expert >= args.experts) {
    finish_slice.store_nan();
    return;
  }
  const Items items = {
      1, args.column_tiles / T, args.k_splits, args.k_splits_inverse, T * MARLIN_TILE, Matrix ? 8 : Rows};
  finish_slice.items = items;
  const ExpertWeights weights = find_expert(codes, offsets, formats, rows.expert);

  if constexpr (!Matrix) {
    if (local_input) {
      const LocalBuffer<Rows> local = {shared + items.count() * items.item_sums(), args.k, 1};
      if (fused_prologue) {
        rotate_rows<Rows>(args, rows, x, finish_slice.order, suh, suh, local, simdgroup, simdgroups, lane);
      } else if (activating_input) {
        SumsFinish finish_sums;
        finish_sums.svh = first_svh;
        finish_sums.down_suh = suh;
        if (gated_epilogue) {
          finish_sums.second_svh = second_svh;
        }
        if (first_bias) {
          finish_sums.biases = first_biases;
        }
        if (second_bias) {
          finish_sums.second_biases = second_biases;
        }
        activate_rows<Rows>(args, rows, sums, finish_sums, local, simdgroup, simdgroups, lane);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      Operands<LocalRows> operands;
      operands.weights[0] = weights;
      operands.x[0] = local.rows(0);
      row_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, simdgroups, lane, finish_slice);
      return;
    }
  }
  const RotatedBuffer buffer = {position_rows(args.positions), args.k, 1};
  Operands<DeviceRows> operands;
  operands.weights[0] = weights;
  operands.x[0] = buffer.at(rotated, 0, rows.first);
  if constexpr (Matrix) {
    matrix_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, lane, finish_slice);
  } else {
    row_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, simdgroups, lane, finish_slice);
  }
}
