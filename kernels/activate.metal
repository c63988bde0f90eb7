// Sums of gate and up -> down's rotated input, where the product has not done it: H, svh, bias, activation,
// down's suh, H.
#include "activation.h"
#include "rotated.h"

// One simdgroup per position and 128-block.
[[kernel]] void trellis_activate(
    constant MarlinActivateArgs& args [[buffer(0)]],
    device const float* sums [[buffer(1)]],
    device const uint* indices [[buffer(2)]],
    device const uint* order [[buffer(3), function_constant(routed)]],
    device const half* gate_svh [[buffer(4)]],
    device const half* up_svh [[buffer(5)]],
    device const half* down_suh [[buffer(6)]],
    device const float* gate_biases [[buffer(7), function_constant(gate_bias)]],
    device const float* up_biases [[buffer(8), function_constant(up_bias)]],
    device float* rotated [[buffer(9)]],
    uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]) {
  const ushort lane = ushort(lane_index);
  const uint blocks = args.n / MARLIN_HADAMARD_SIZE;
  const uint task = group * simdgroups + simdgroup;
  const uint position = task / blocks;
  const uint first = (task % blocks) * MARLIN_HADAMARD_SIZE;
  if (position >= args.positions) {
    return;
  }
  uint slot = position;
  if (routed) {
    slot = order[position];
  }
  uint expert = args.experts;
  if (slot != ~0u) {
    expert = indices[slot];
  }
  if (expert >= args.experts) {
    return;
  }
  const ulong at = ulong(expert) * args.n + first;
  device const float* row = sums + 2 * ulong(position) * args.n + first;
  device const float* gate_b = nullptr;
  device const float* up_b = nullptr;
  if (gate_bias) {
    gate_b = gate_biases + at;
  }
  if (up_bias) {
    up_b = up_biases + at;
  }
  const float4 gate = finish(load_floats(row, lane), gate_svh + at, gate_b, gate_bias, lane);
  const float4 up = finish(load_floats(row + args.n, lane), up_svh + at, up_b, up_bias, lane);
  const float4 v = activate_block(gate, up, down_suh + at, args.alpha, args.limit, lane);
  store_rotated({position_rows(args.positions), args.n, 1}, 0, rotated, position, first, lane, v);
}
