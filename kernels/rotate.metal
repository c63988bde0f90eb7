// x -> rotated activations: gather, suh, Hadamard transform. One copy per projection, because suh differs.
#include "rotated.h"

// Position -> slot -> row of x and expert. A position without a valid slot gets zeros.
struct RotateSource {
  device const uchar* x;
  device const uint* indices;
  device const uint* order;

  METAL_FUNC float4
  block(constant MarlinRotateArgs& args, device const half* suh, uint position, uint first, ushort lane) const thread {
    uint slot = position;
    if (routed) {
      slot = position < args.positions ? order[position] : ~0u;
    }
    if (slot == ~0u || position >= args.positions) {
      return float4(0.0f);
    }
    const uint expert = indexed ? indices[slot] : 0;
    if (expert >= args.experts) {
      return float4(0.0f);
    }
    // A division by slots_per_row: exact, as the host has checked.
    const uint row = mulhi(2 * slot, args.slots_per_row_inverse);
    const float4 v = load_row(x, row, args.columns, first, lane);
    return hadamard(v * load_halves(suh + ulong(expert) * args.k + first, lane), lane);
  }
};

// One simdgroup per 128-block and position, or unit of 8 positions for fragments. A threadgroup has blocks of one unit,
// so that nothing is divided to find them.
[[kernel]] void trellis_rotate(
    constant MarlinRotateArgs& args [[buffer(0)]],
    device const uchar* x [[buffer(1)]],
    device const uint* indices [[buffer(2), function_constant(indexed)]],
    device const uint* order [[buffer(3), function_constant(routed)]],
    device const half* suh [[buffer(4)]],
    device const half* second_suh [[buffer(5), function_constant(gated)]],
    device float* rotated [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]) {
  const ushort lane = ushort(lane_index);
  const uint rows_per_unit = fragments ? 8 : 1;
  const uint units = (args.positions + rows_per_unit - 1) / rows_per_unit;
  const uint blocks = args.k / MARLIN_HADAMARD_SIZE;
  const uint projections = gated ? 2 : 1;
  const uint block = group.y * simdgroups + simdgroup;
  if (block >= blocks) {
    return;
  }
  const uint first = block * MARLIN_HADAMARD_SIZE;
  const uint unit = group.x;
  const bool second = gated && group.z != 0;
  RotateSource source = {x, nullptr, nullptr};
  if (indexed) {
    source.indices = indices;
  }
  if (routed) {
    source.order = order;
  }
  device const half* scales = suh;
  if (gated) {
    scales = second ? second_suh : suh;
  }
  const RotatedBuffer layout = {units * rows_per_unit, args.k, projections};
  if (!fragments) {
    store_rotated(layout, second, rotated, unit, first, lane, source.block(args, scales, unit, first, lane));
    return;
  }
  if (routed) {
    // An expert's first position is the first of a unit: without it the unit is padding, which nobody reads.
    if (order[unit * 8] == ~0u) {
      return;
    }
  }
  float4 v[8];
  MARLIN_UNROLL
  for (uint r = 0; r < 8; ++r) {
    v[r] = source.block(args, scales, unit * 8 + r, first, lane);
  }
  store_rotated_unit(layout, second, rotated, unit, first, lane, v);
}
