// Rows of y from the rows of its slots, added in slot order; applies H, svh and bias where the product has not.
#include "activation.h"

// One simdgroup per row of y and 128-block.
[[kernel]] void trellis_combine(
    constant MarlinCombineArgs& args [[buffer(0)]],
    device const float* slots [[buffer(1)]],
    device const uint* indices [[buffer(2), function_constant(indexed)]],
    device const float* scores [[buffer(3), function_constant(weighted)]],
    device const half* svh [[buffer(4), function_constant(raw_output)]],
    device const float* biases [[buffer(5), function_constant(down_bias)]],
    device uchar* y [[buffer(6)]],
    uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]) {
  const ushort lane = ushort(lane_index);
  const uint blocks = args.n / MARLIN_HADAMARD_SIZE;
  const uint task = group * simdgroups + simdgroup;
  const uint row = task / blocks;
  const uint first = (task % blocks) * MARLIN_HADAMARD_SIZE;
  if (row >= args.rows) {
    return;
  }
  float4 total = float4(0.0f);
  for (uint i = 0; i < args.slots_per_row; ++i) {
    const uint slot = row * args.slots_per_row + i;
    const uint expert = indexed ? indices[slot] : 0;
    float4 v = float4(NAN);  // an index out of range
    if (expert < args.experts) {
      v = load_floats(slots + ulong(slot) * args.n + first, lane);
      if (raw_output) {
        const ulong at = ulong(expert) * args.n + first;
        device const float* bias = nullptr;
        if (down_bias) {
          bias = biases + at;
        }
        v = finish(v, svh + at, bias, down_bias, lane);
      }
    }
    total = weighted ? fma(float4(scores[slot]), v, total) : v;
  }
  store_row(y, row, args.out_columns, first, lane, total);
}
