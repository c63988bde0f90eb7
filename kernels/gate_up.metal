// Rows times what reads them of an expert, its gate and up weights or up alone, and what follows up to down's rotated
// input.
#include "product.h"

struct GateUpFinish {
  constant MarlinProductArgs* args;
  Items items;
  RowRange rows;
  uint first_column;
  threadgroup const float* sums;
  SumsFinish finish_sums;
  device float* out;
  uint simdgroup;
  uint simdgroups;
  ushort lane;

  // Writes `count` rows: raw sums, or activated blocks of 128, one per simdgroup.
  METAL_FUNC void slice(uint first_row, uint count) const thread {
    const uint columns = min(args->column_tiles * MARLIN_TILE, args->n - first_column);
    if (raw_output) {
      for (uint task = simdgroup; task < items.projections * count; task += simdgroups) {
        const uint row = gated ? task / 2 : task;
        const uint projection = task - row * items.projections;
        const ulong at = (items.projections * ulong(rows.first + first_row + row) + projection) * args->n;
        for (uint column = lane; column < columns; column += MARLIN_SIMD_SIZE) {
          out[at + first_column + column] = items.sum(sums, projection, column, row);
        }
      }
      return;
    }
    const uint blocks = columns / MARLIN_HADAMARD_SIZE;
    for (uint task = simdgroup; task < blocks * count; task += simdgroups) {
      const uint row = row_of_block(task, blocks);
      const uint first = (task - row * blocks) * MARLIN_HADAMARD_SIZE;
      const uint column = first_column + first;
      const float4 up = gated ? items.block(sums, 1, first, row, lane) : float4(0.0f);
      const float4 v = finish_sums.block(
          items.block(sums, 0, first, row, lane), up, ulong(rows.expert) * args->n + column, args->alpha, args->limit,
          lane);
      const uint position = rows.first + first_row + row;
      store_rotated({position_rows(args->positions), args->n, 1}, 0, out, position, column, lane, v);
    }
  }
};

// Rows: rows of a row tile, in units of 8 if Matrix. T: adjacent column tiles per simdgroup.
template <int Rows, int T, bool Matrix>
[[kernel, max_total_threads_per_threadgroup(MARLIN_SOURCE_max_threads)]] void trellis_gate_up(
    constant MarlinProductArgs& args [[buffer(0)]],
    device const uchar* x [[buffer(1), function_constant(fused_prologue)]],
    device const float* rotated [[buffer(2), function_constant(rotated_input)]],
    device const uint* indices [[buffer(3), function_constant(indexed)]],
    device const uint* order [[buffer(4), function_constant(routed)]],
    device const MarlinRowTile* row_tiles [[buffer(5), function_constant(routed)]],
    device const uint* codes [[buffer(6)]],
    device const long* offsets [[buffer(7)]],
    device const uint* formats [[buffer(8)]],
    device const half* suh [[buffer(9), function_constant(fused_prologue)]],
    device const half* svh [[buffer(10), function_constant(fused_epilogue)]],
    device const float* biases [[buffer(11), function_constant(first_bias)]],
    device const uint* second_codes [[buffer(12), function_constant(gated)]],
    device const long* second_offsets [[buffer(13), function_constant(gated)]],
    device const uint* second_formats [[buffer(14), function_constant(gated)]],
    device const half* second_suh [[buffer(15), function_constant(gated_prologue)]],
    device const half* second_svh [[buffer(16), function_constant(gated_epilogue)]],
    device const float* second_biases [[buffer(17), function_constant(second_bias)]],
    device const half* down_suh [[buffer(18), function_constant(fused_epilogue)]],
    device float* out [[buffer(19)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]) {
  const ushort lane = ushort(lane_index);
  device const uint* experts = nullptr;
  device const MarlinRowTile* tiles = nullptr;
  if (indexed) {
    experts = indices;
  }
  device const uint* slots = nullptr;
  if (routed) {
    tiles = row_tiles;
    slots = order;
  }
  const RowRange rows = find_rows(args, group.y, Matrix ? 8 * Rows : Rows, experts, tiles);
  // Of slots whose index is out of range nothing is computed; the last stage writes NaN.
  if (rows.count == 0 || rows.expert >= args.experts) {
    return;
  }
  const uint projections = gated ? 2 : 1;
  const Items items = {projections,           args.column_tiles / T, args.k_splits,
                       args.k_splits_inverse, T * MARLIN_TILE,       Matrix ? 8 : Rows};
  GateUpFinish finish_slice;
  finish_slice.args = &args;
  finish_slice.items = items;
  finish_slice.rows = rows;
  finish_slice.first_column = group.x * args.column_tiles * MARLIN_TILE;
  finish_slice.sums = shared;
  finish_slice.out = out;
  finish_slice.simdgroup = simdgroup;
  finish_slice.simdgroups = simdgroups;
  finish_slice.lane = lane;
  if (fused_epilogue) {
    finish_slice.finish_sums.svh = svh;
    finish_slice.finish_sums.down_suh = down_suh;
  }
  if (gated_epilogue) {
    finish_slice.finish_sums.second_svh = second_svh;
  }
  if (first_bias) {
    finish_slice.finish_sums.biases = biases;
  }
  if (second_bias) {
    finish_slice.finish_sums.second_biases = second_biases;
  }
  const ExpertWeights weights = find_expert(codes, offsets, formats, rows.expert);
  ExpertWeights second = weights;
  if (gated) {
    second = find_expert(second_codes, second_offsets, second_formats, rows.expert);
  }

  if constexpr (!Matrix) {
    if (fused_prologue) {
      const LocalBuffer<Rows> local = {shared + items.count() * items.item_sums(), args.k, projections};
      device const half* other_suh = suh;
      if (gated_prologue) {
        other_suh = second_suh;
      }
      rotate_rows<Rows>(args, rows, x, slots, suh, other_suh, local, simdgroup, simdgroups, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const Operands<LocalRows> operands = {{weights, second}, {local.rows(0), local.rows(projections - 1)}};
      row_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, simdgroups, lane, finish_slice);
      return;
    }
  }
  const RotatedBuffer buffer = {position_rows(args.positions), args.k, projections};
  const Operands<DeviceRows> operands = {
      {weights, second}, {buffer.at(rotated, 0, rows.first), buffer.at(rotated, projections - 1, rows.first)}};
  if constexpr (Matrix) {
    matrix_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, lane, finish_slice);
  } else {
    row_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, simdgroups, lane, finish_slice);
  }
}
