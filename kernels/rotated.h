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
// [rows, k / 128] scales. A row is in tile order, or rows are in units of 8 that are 8x8 fragments, of which a lane has
// its elements of both halves of a tile's depth side by side: [k / 16][unit][lane][half][2], scales [k / 128][unit][row].
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
    const uint rows_before = fragments ? row : row * (k / MARLIN_TILE);  // in a tile's depth
    const uint scales_before = fragments ? row : row * (k / MARLIN_HADAMARD_SIZE);
    DeviceRows found;
    found.values = (device const Operand4*)buffer + ulong(copy) * rows * (k / 4) + ulong(rows_before) * 4;
    found.scales = buffer + first_scale(copy) + scales_before;
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

// Where a lane's elements of a unit's fragments are: of columns `first` + 2 q + {0, 8} of a tile, rows 2 h and 2 h + 1.
METAL_FUNC ulong fragment_place(RotatedBuffer layout, uint copy, uint unit, uint column, uint h) {
  const ulong step = ulong(column / MARLIN_TILE) * (layout.rows / 8) + unit;
  return ulong(copy) * layout.rows * (layout.k / 4) + step * MARLIN_SIMD_SIZE + column % MARLIN_TILE * 4 + h;
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
  device float* scales = buffer + layout.first_scale(copy);
  if (fragments) {
    const Operand4 operands = as_operands(v, scales + ulong(block) * layout.rows + row, lane);
    MARLIN_UNROLL
    for (uint c = 0; c < 2; ++c) {
      const ulong at = fragment_place(layout, copy, row / 8, first + lane_column(lane) + c, row % 8 / 2);
      device Operand* to = (device Operand*)buffer + at * 4 + row % 2;
      to[0] = operands[c];
      to[2] = operands[c + 2];
    }
  } else {
    const Operand4 operands = as_operands(v, scales + ulong(row) * blocks + block, lane);
    const ulong at = (ulong(copy) * layout.rows + row) * (layout.k / 4) + first / 4 + lane;
    ((device Operand4*)buffer)[at] = operands;
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
  device float* scales =
      buffer + layout.first_scale(copy) + ulong(first / MARLIN_HADAMARD_SIZE) * layout.rows + unit * 8;
  Operand4 operands[8];
  MARLIN_UNROLL
  for (uint r = 0; r < 8; ++r) {
    operands[r] = as_operands(v[r], scales + r, lane);
  }
  MARLIN_UNROLL
  for (uint c = 0; c < 2; ++c) {
    const ulong at = fragment_place(layout, copy, unit, first + lane_column(lane) + c, 0);
    MARLIN_UNROLL
    for (uint h = 0; h < 4; ++h) {
      ((device Operand4*)buffer)[at + h] = vec<Operand, 4>(
          operands[2 * h][c], operands[2 * h + 1][c], operands[2 * h][c + 2], operands[2 * h + 1][c + 2]);
    }
  }
}
