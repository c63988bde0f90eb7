// The share of a simdgroup in a product on the neural accelerators of M5. Only sources for them include this file: its
// header is in macOS from 26.2 on.
#pragma once

#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>

#include "tile_product.h"

// M units of 16 rows times T adjacent tiles, two at a time. The eight weights of trellis_lane are a lane's elements of
// the transposed tile, and four values of a row in tile order its elements of x, so that both go from registers to the
// multiplier: no shuffle, no threadgroup memory, no barrier. Products of one 16-deep tile are added there, as floats;
// times their block's scale they are added to the sums here, which takes half the registers of sums by block.
template <int M, int T>
struct AcceleratorProduct {
  static_assert(T % 2 == 0, "a multiplication takes two tiles");

  device const ushort* codes;  // of the expert
  uint first_tile;             // column tile
  uint tiles_per_row;
  DeviceRows x;   // of the first row
  uint depth;     // tiles of k
  uint last_row;  // rows from here on repeat this one: they are not stored
  uint units;     // of 8 rows that have rows, at least 1
  uint k_begin;   // in tiles
  uint k_end;
  ushort lane;  // trellis lane: rows lane / 4 and lane / 4 + 8 of a unit, columns 4 (lane % 4) and the next three
  uint zero;
  float4 sums[M][T][2];  // four columns of each of the lane's rows

  METAL_FUNC void set_rows(uint count, uint) thread {
    units = (count + 7) / 8;
    last_row = count - 1;
  }

  METAL_FUNC uint row(uint unit, uint eight) const thread {
    return min(16 * unit + 8 * eight + lane / 4, last_row);
  }

  template <int H, int Codebook>
  METAL_FUNC void run() thread {
    constexpr uint tile_size = 8 * H;
    LanePlaces<H> places = find_places<H>(k_begin * tiles_per_row + first_tile, lane);
    for (uint k = k_begin; k < k_end;) {
      float scale[M][2];
      MARLIN_UNROLL
      for (uint m = 0; m < M; ++m) {
        MARLIN_UNROLL
        for (uint eight = 0; eight < 2; ++eight) {
          scale[m][eight] = x.scales[(row(m, eight) * depth + k) / kBlockTiles];
        }
      }
      for (const uint stop = same_scale_until(k, k_end); k < stop; ++k) {
        // Of units without rows the last row: loads that nothing guards can all be under way at once.
        Operand4 v[M][2];
        MARLIN_UNROLL
        for (uint m = 0; m < M; ++m) {
          MARLIN_UNROLL
          for (uint eight = 0; eight < 2; ++eight) {
            v[m][eight] = x.values[(row(m, eight) * depth + k) * 4 + lane % 4];
          }
        }
        MARLIN_UNROLL
        for (int pair = 0; pair < T / 2; ++pair) {
          const int t = 2 * pair;
          const LaneWeights first = decode_lane<H, Codebook>(codes + t * tile_size, places, lane, zero);
          const LaneWeights second = decode_lane<H, Codebook>(codes + (t + 1) * tile_size, places, lane, zero);
          MARLIN_UNROLL
          for (uint m = 0; m < M; ++m) {
            if (2 * m < units) {
              float4 products[4] = {float4(0.0f), float4(0.0f), float4(0.0f), float4(0.0f)};
              multiply_add(v[m], first, second, products);
              MARLIN_UNROLL
              for (int i = 0; i < 4; ++i) {
                sums[m][t + i / 2][i % 2] = fma(products[i], float4(scale[m][i % 2]), sums[m][t + i / 2][i % 2]);
              }
            }
          }
        }
        places.move(tiles_per_row);
      }
    }
  }

  // Adds 16 rows times both tiles: products of the first tile with the lane's row and the one 8 below, then of the second.
  static METAL_FUNC void multiply_add(
      const thread half4 (&rows)[2],
      const thread LaneWeights& first,
      const thread LaneWeights& second,
      thread float4 (&products)[4]) {
    // Nothing is relaxed: operands are halves, whose products are exact, and sums are floats.
    constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
        16, 32, 16, false, true, false, mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
    mpp::tensor_ops::matmul2d<descriptor, metal::execution_simdgroup> op;
    // The type of what is returned: that of a variable has an address space on macOS 27, where no operand may have one.
    typedef decltype(op.template get_left_input_cooperative_tensor<half, half, float>()) Left;
    typedef decltype(op.template get_right_input_cooperative_tensor<half, half, float>()) Right;
    Left a = op.template get_left_input_cooperative_tensor<half, half, float>();
    Right b = op.template get_right_input_cooperative_tensor<half, half, float>();
    auto c = op.template get_destination_cooperative_tensor<Left, Right, float>();
    MARLIN_UNROLL
    for (ushort i = 0; i < kLaneWeights; ++i) {
      a[i] = rows[i / 4][i % 4];
      b[i] = first.value[i];
      b[kLaneWeights + i] = second.value[i];
    }
    MARLIN_UNROLL
    for (ushort i = 0; i < 16; ++i) {
      c[i] = products[i / 4][i % 4];
    }
    op.run(a, b, c);
    MARLIN_UNROLL
    for (ushort i = 0; i < 16; ++i) {
      products[i / 4][i % 4] = c[i];
    }
  }

  // The same for floats that split_halves made two halves of.
  static METAL_FUNC void multiply_add(
      const thread float4 (&rows)[2],
      const thread LaneWeights& first,
      const thread LaneWeights& second,
      thread float4 (&products)[4]) {
    const half4 high[2] = {as_type<half4>(rows[0].xy), as_type<half4>(rows[1].xy)};
    const half4 low[2] = {as_type<half4>(rows[0].zw), as_type<half4>(rows[1].zw)};
    multiply_add(low, first, second, products);
    multiply_add(high, first, second, products);
  }

  METAL_FUNC void clear() thread {
    MARLIN_UNROLL
    for (int m = 0; m < M; ++m) {
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[m][t][0] = sums[m][t][1] = float4(0.0f);
      }
    }
  }

  // Writes the item's sums of one unit of 8 rows.
  METAL_FUNC void store(threadgroup float* out, uint unit) thread {
    MARLIN_UNROLL
    for (uint m = 0; m < M; ++m) {
      MARLIN_UNROLL
      for (uint eight = 0; eight < 2; ++eight) {
        if (2 * m + eight == unit) {
          MARLIN_UNROLL
          for (int t = 0; t < T; ++t) {
            MARLIN_UNROLL
            for (int j = 0; j < 4; ++j) {
              out[(t * MARLIN_TILE + 4 * (lane % 4) + j) * 8 + lane / 4] = sums[m][t][eight][j];
            }
          }
        }
      }
    }
  }
};
