// Rows times an expert's gate and up weights, and what follows up to down's rotated input.
#include "product.h"

struct GateUpFinish {
  constant MarlinProductArgs* args;
  Items<2> items;
  RowRange rows;
  uint first_column;
  threadgroup const float* sums;
  device const half* gate_svh;
  device const half* up_svh;
  device const half* down_suh;
  device const float* gate_biases;
  device const float* up_biases;
  device float* out;
  uint simdgroup;
  uint simdgroups;
  ushort lane;

  // Writes `count` rows: raw sums, or activated blocks of 128, one per simdgroup.
  METAL_FUNC void slice(uint first_row, uint count) const thread {
    const uint columns = min(args->column_tiles * MARLIN_TILE, args->n - first_column);
    if (raw_output) {
      for (uint task = simdgroup; task < 2 * count; task += simdgroups) {
        const uint projection = task % 2;
        const uint row = task / 2;
        const ulong at = (2 * ulong(rows.first + first_row + row) + projection) * args->n;
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
      const uint position = rows.first + first_row + row;
      store(
          position, first_column + first, items.block(sums, 0, first, row, lane),
          items.block(sums, 1, first, row, lane));
    }
  }

  METAL_FUNC void store(uint position, uint first, float4 gate, float4 up) const thread {
    const ulong at = ulong(rows.expert) * args->n + first;
    device const float* gate_b = nullptr;
    device const float* up_b = nullptr;
    if (gate_bias) {
      gate_b = gate_biases + at;
    }
    if (up_bias) {
      up_b = up_biases + at;
    }
    gate = finish(gate, gate_svh + at, gate_b, gate_bias, lane);
    up = finish(up, up_svh + at, up_b, up_bias, lane);
    const float4 v = activate_block(gate, up, down_suh + at, args->alpha, args->limit, lane);
    store_rotated({position_rows(args->positions), args->n, 1}, 0, out, position, first, lane, v);
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
    device const uint* gate_codes [[buffer(6)]],
    device const long* gate_offsets [[buffer(7)]],
    device const uint* gate_formats [[buffer(8)]],
    device const half* gate_suh [[buffer(9), function_constant(fused_prologue)]],
    device const half* gate_svh [[buffer(10), function_constant(fused_epilogue)]],
    device const float* gate_biases [[buffer(11), function_constant(gate_bias)]],
    device const uint* up_codes [[buffer(12)]],
    device const long* up_offsets [[buffer(13)]],
    device const uint* up_formats [[buffer(14)]],
    device const half* up_suh [[buffer(15), function_constant(fused_prologue)]],
    device const half* up_svh [[buffer(16), function_constant(fused_epilogue)]],
    device const float* up_biases [[buffer(17), function_constant(up_bias)]],
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
  const Items<2> items = {
      args.column_tiles / T, args.k_splits, args.k_splits_inverse, T * MARLIN_TILE, Matrix ? 8 : Rows};
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
    finish_slice.gate_svh = gate_svh;
    finish_slice.up_svh = up_svh;
    finish_slice.down_suh = down_suh;
  }
  if (gate_bias) {
    finish_slice.gate_biases = gate_biases;
  }
  if (up_bias) {
    finish_slice.up_biases = up_biases;
  }
  const ExpertWeights gate = find_expert(gate_codes, gate_offsets, gate_formats, rows.expert);
  const ExpertWeights up = find_expert(up_codes, up_offsets, up_formats, rows.expert);

  if constexpr (!Matrix) {
    if (fused_prologue) {
      const LocalBuffer<Rows> local = {shared + items.count() * items.item_sums(), args.k, 2};
      rotate_rows<Rows, 2>(args, rows, x, slots, gate_suh, up_suh, local, simdgroup, simdgroups, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const Operands<LocalRows> operands = {{gate, up}, {local.rows(0), local.rows(1)}};
      row_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, simdgroups, lane, finish_slice);
      return;
    }
  }
  const RotatedBuffer buffer = {position_rows(args.positions), args.k, 2};
  const Operands<DeviceRows> operands = {
      {gate, up}, {buffer.at(rotated, 0, rows.first), buffer.at(rotated, 1, rows.first)}};
  if constexpr (Matrix) {
    matrix_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, lane, finish_slice);
  } else {
    row_slices<Rows, T>(args, operands, items, rows, group.x, shared, simdgroup, simdgroups, lane, finish_slice);
  }
}
