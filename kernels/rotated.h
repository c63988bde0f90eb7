// Rotated activations: what a product multiplies with weights. Floats, or halves of a block's power of two. The
// accelerators multiply halves: there a float becomes two, the second of which is what the first leaves over.
#pragma once

#include "hadamard.h"

template <bool Half>
struct OperandType {
  typedef float type;
};
template <>
struct OperandType<true> {
  typedef half type;
};
typedef OperandType<half_operands != 0>::type Operand;
typedef vec<Operand, 4> Operand4;  // two times four halves in place of four floats, see split_halves

// Whether operands are halves of a block's power of two.
static constant constexpr const bool scaled_operands = half_operands != 0 || accelerator != 0;

// Where the four values of each tile row and, with halves, the scale of each block are. Values: device or threadgroup
// const Operand4*; Scales: const float* in the same space.
template <typename Values, typename Scales>
struct RotatedRows {
  Values values;
  Scales scales;
};
typedef RotatedRows<device const Operand4*, device const float*> DeviceRows;
typedef RotatedRows<threadgroup const Operand4*, threadgroup const float*> LocalRows;

// A buffer of rotated activations: `copies` times [rows, k] operands, then if they are scaled as many times
// [rows, k / 128] scales. A row is in tile order, or rows are in units of 8 that are 8x8 fragments: [k / 8][column][row], scales
// [k / 128][row].
struct RotatedBuffer {
  uint rows;
  uint k;
  uint copies;

  METAL_FUNC ulong first_scale(uint copy) const thread {
    const ulong values = ulong(copies) * rows * k * sizeof(Operand) / sizeof(float);
    return values + ulong(copy) * rows * (k / MARLIN_HADAMARD_SIZE);
  }
  // Rows from `row` on, the first of a unit for fragments.
  METAL_FUNC DeviceRows at(device const float* buffer, uint copy, uint row) const thread {
    DeviceRows found;
    found.values = (device const Operand4*)buffer + (ulong(copy) * rows + row) * (k / 4);
    found.scales = buffer + first_scale(copy) + ulong(row) * (k / MARLIN_HADAMARD_SIZE);
    return found;
  }
};

// Rows of a buffer that holds `positions`: whole units for fragments.
METAL_FUNC uint position_rows(uint positions) {
  return fragments ? (positions + 7) / 8 * 8 : positions;
}

// The power of two that brings a block's largest magnitude into [1, 2), so that the division is exact: halves keep 11
// bits of every value above 2^-14 of the largest. For the accelerators, whose sums are floats, into [2^14, 2^15): the
// second halves of split_halves are normal numbers too. Of a block that is not finite the values become infinite or NaN.
struct BlockScale {
  float scale;
  float inverse;
};

METAL_FUNC BlockScale block_scale(float4 v) {
  const float4 magnitudes = abs(v);
  const float2 pair = max(magnitudes.xy, magnitudes.zw);
  const uint bits = as_type<uint>(simd_max(max(pair.x, pair.y)));
  constexpr uint raised = accelerator != 0 ? 14 : 0;
  // The scale and its inverse are normal.
  const uint exponent = clamp(bits >> 23, 1u + raised, raised != 0 ? 254u : 253u);
  return {as_type<float>((exponent - raised) << 23), as_type<float>((254u + raised - exponent) << 23)};
}

// Four floats as four halves and what these leave over, which together have 22 bits: the halves' bits in place of the
// floats'.
METAL_FUNC float4 split_halves(float4 v) {
  const half4 high = half4(v);
  const half4 low = half4(v - float4(high));
  return float4(as_type<float2>(high), as_type<float2>(low));
}

// A lane's four values of one block, as operands; the block's scale goes to `scale`, from the first lane.
template <typename Scale>
METAL_FUNC Operand4 as_operands(float4 v, Scale scale, ushort lane) {
  if constexpr (scaled_operands) {
    const BlockScale block = block_scale(v);
    if (lane == 0) {
      *scale = block.scale;
    }
    v *= block.inverse;
    return Operand4(half_operands != 0 ? v : split_halves(v));
  } else {
    return Operand4(v);
  }
}

METAL_FUNC void store_rotated(
    RotatedBuffer layout,
    uint copy,
    device float* buffer,
    uint row,
    uint first,
    ushort lane,
    float4 v) {
  const uint blocks = layout.k / MARLIN_HADAMARD_SIZE;
  const uint block = first / MARLIN_HADAMARD_SIZE;
  const ulong base = ulong(copy) * layout.rows;
  device float* scales = buffer + layout.first_scale(copy);
  if (fragments) {
    const uint unit = row / 8;
    const Operand4 operands = as_operands(v, scales + (ulong(unit) * blocks + block) * 8 + row % 8, lane);
    device Operand* to = (device Operand*)buffer + (base + unit * 8) * layout.k + row % 8;
    MARLIN_UNROLL
    for (uint j = 0; j < 4; ++j) {
      to[(first + lane_column(lane) + value_offset(j)) * 8] = operands[j];
    }
  } else {
    const Operand4 operands = as_operands(v, scales + ulong(row) * blocks + block, lane);
    ((device Operand4*)buffer)[(base + row) * (layout.k / 4) + first / 4 + lane] = operands;
  }
}

// Eight rows of a unit at once, whose fragments are whole.
METAL_FUNC void store_rotated_unit(
    RotatedBuffer layout,
    uint copy,
    device float* buffer,
    uint unit,
    uint first,
    ushort lane,
    const thread float4* v) {
  const uint blocks = layout.k / MARLIN_HADAMARD_SIZE;
  device float* scales = buffer + layout.first_scale(copy) + (ulong(unit) * blocks + first / MARLIN_HADAMARD_SIZE) * 8;
  device Operand* to = (device Operand*)buffer + (ulong(copy) * layout.rows + unit * 8) * layout.k;
  Operand4 operands[8];
  MARLIN_UNROLL
  for (uint r = 0; r < 8; ++r) {
    operands[r] = as_operands(v[r], scales + r, lane);
  }
  MARLIN_UNROLL
  for (uint j = 0; j < 4; ++j) {
    const uint column = first + lane_column(lane) + value_offset(j);
    device Operand4* rows = (device Operand4*)(to + ulong(column) * 8);
    rows[0] = vec<Operand, 4>(operands[0][j], operands[1][j], operands[2][j], operands[3][j]);
    rows[1] = vec<Operand, 4>(operands[4][j], operands[5][j], operands[6][j], operands[7][j]);
  }
}
