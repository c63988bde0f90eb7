// A block of 128 values in a simdgroup: scales and Hadamard transform.
#pragma once

#include "common.h"

// Lane l holds columns 16 (l / 4) + 2 (l % 4) + {0, 1, 8, 9} of a block: the rows of a tile that a decoding lane
// needs, so that a product reads its four values of x at once ("tile order").
METAL_FUNC uint lane_column(uint lane) {
  return MARLIN_TILE * (lane / 4) + 2 * (lane % 4);
}

// Offset of the j-th value of a lane from lane_column.
METAL_FUNC uint value_offset(uint j) {
  return (j & 1) + 8 * (j >> 1);
}

// Sylvester order, divided by sqrt(128). Column bits 0 and 3 are inside a lane, the others are lane bits.
METAL_FUNC float4 hadamard(float4 v, ushort lane) {
  v = float4(v.x + v.y, v.x - v.y, v.z + v.w, v.z - v.w);
  v = float4(v.x + v.z, v.y + v.w, v.x - v.z, v.y - v.w);
  MARLIN_UNROLL
  for (ushort mask = 1; mask < MARLIN_SIMD_SIZE; mask *= 2) {
    const float4 other = simd_shuffle_xor(v, mask);
    v = fma(float4((lane & mask) ? -1.0f : 1.0f), v, other);
  }
  return v * 0.088388347648f;
}

METAL_FUNC float4 load_halves(device const half* scales, uint lane) {
  device const half2* pairs = (device const half2*)(scales + lane_column(lane));
  return float4(float2(pairs[0]), float2(pairs[4]));
}

METAL_FUNC float4 load_floats(device const float* values, uint lane) {
  device const float2* pairs = (device const float2*)(values + lane_column(lane));
  return float4(pairs[0], pairs[4]);
}

// Four values of a row of x; columns from `columns` on are padding.
METAL_FUNC float4 load_row(device const uchar* x, ulong row, uint columns, uint first, uint lane) {
  float4 v;
  MARLIN_UNROLL
  for (uint j = 0; j < 4; ++j) {
    const uint column = first + lane_column(lane) + value_offset(j);
    v[j] = column < columns ? load_element(x, row * columns + column) : 0.0f;
  }
  return v;
}

METAL_FUNC void store_row(device uchar* y, ulong row, uint columns, uint first, uint lane, float4 v) {
  MARLIN_UNROLL
  for (uint j = 0; j < 4; ++j) {
    const uint column = first + lane_column(lane) + value_offset(j);
    if (column < columns) {
      store_element(y, row * columns + column, v[j]);
    }
  }
}
