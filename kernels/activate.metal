// Sums of the projections of x -> down's rotated input, where the product has not done it: H, svh, bias, activation,
// down's suh, H.
#include "activation.h"
#include "rotated.h"

// One simdgroup per position and 128-block.
[[kernel]] void trellis_activate(
    constant MarlinActivateArgs& args [[buffer(0)]],
    device const float* sums [[buffer(1)]],
    device const uint* indices [[buffer(2)]],
    device const uint* order [[buffer(3), function_constant(routed)]],
    device const half* first_svh [[buffer(4)]],
    device const half* second_svh [[buffer(5), function_constant(gated_epilogue)]],
    device const float* first_biases [[buffer(6), function_constant(first_bias)]],
    device const float* second_biases [[buffer(7), function_constant(second_bias)]],
    device const half* down_suh [[buffer(8)]],
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
  SumsFinish finish_sums;
  finish_sums.svh = first_svh;
  if (first_bias) {
    finish_sums.biases = first_biases;
  }
  if (gated_epilogue) {
    finish_sums.second_svh = second_svh;
  }
  if (second_bias) {
    finish_sums.second_biases = second_biases;
  }
  finish_sums.down_suh = down_suh;
  const ulong at = ulong(expert) * args.n + first;
  device const float* row = sums + (gated ? 2 : 1) * ulong(position) * args.n + first;
  const float4 second = gated ? load_floats(row + args.n, lane) : float4(0.0f);
  const float4 v = finish_sums.block(load_floats(row, lane), second, at, args.alpha, args.limit, lane);
  store_rotated({position_rows(args.positions), args.n, 1}, 0, rotated, position, first, lane, v);
}
