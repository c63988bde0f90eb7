// One simdgroup's share of a product: rows times adjacent column tiles over a range of k, sums in registers.
//
// With half operands sums are floats too, except that without matrices the products of one 16-deep tile are added as
// halves. Sums of what has one scale are multiplied with it before they are added to others.
#pragma once

#include "rotated.h"
#include "trellis.h"

static constant constexpr const uint kBlockTiles = MARLIN_HADAMARD_SIZE / MARLIN_TILE;

// The first tile of k after `k` whose rows have another scale, or the end.
METAL_FUNC uint same_scale_until(uint k, uint k_end) {
  return scaled_operands ? min((k / kBlockTiles + 1) * kBlockTiles, k_end) : k_end;
}

// The trellis lane whose weights are a lane's elements of transposed matrices. Of an 8x8 matrix lane l holds row f and
// columns 2 h and 2 h + 1, with f and h from its bits; of a 16x16 fragment rows f and f + 8 and columns 4 h to 4 h + 3.
// A tile's rows are taken in tile order, in which the four of a trellis lane are neighbours.
METAL_FUNC ushort trellis_lane(ushort lane) {
  const ushort f = (lane / 4 & 4) + (lane / 2 & 3);
  const ushort h = (lane / 4 & 2) + (lane & 1);
  return 4 * f + h;
}

// R rows times T adjacent tiles on the float pipes. Lane l sums columns l / 4 and l / 4 + 8 of each tile over the
// four rows of k that it holds. X: DeviceRows or LocalRows.
template <int R, int T, typename X>
struct RowProduct {
  device const ushort* codes;  // of the expert
  uint first_tile;             // column tile
  uint tiles_per_row;
  X x;
  uint depth;     // tiles of k
  uint last_row;  // rows from here on repeat this one: they are not stored
  uint k_begin;   // in tiles
  uint k_end;
  ushort lane;
  uint zero;
  float sums[R][T][2];

  template <int H, int Codebook>
  METAL_FUNC void run() thread {
    constexpr uint tile_size = 8 * H;
    LanePlaces<H> places = find_places<H>(k_begin * tiles_per_row + first_tile, lane);
    for (uint k = k_begin; k < k_end;) {
      float scale[R];
      if constexpr (half_operands != 0) {
        MARLIN_UNROLL
        for (int r = 0; r < R; ++r) {
          scale[r] = x.scales[(min(uint(r), last_row) * depth + k) / kBlockTiles];
        }
      }
      for (const uint stop = same_scale_until(k, k_end); k < stop; ++k) {
        Operand4 v[R];
        MARLIN_UNROLL
        for (int r = 0; r < R; ++r) {
          v[r] = x.values[(min(uint(r), last_row) * depth + k) * 4 + lane % 4];
        }
        MARLIN_UNROLL
        for (int t = 0; t < T; ++t) {
          const LaneWeights w = decode_lane<H, Codebook>(codes + t * tile_size, places, lane, zero);
          MARLIN_UNROLL
          for (int r = 0; r < R; ++r) {
            MARLIN_UNROLL
            for (int c = 0; c < 2; ++c) {
              if constexpr (half_operands != 0) {
                half sum = w.value[4 * c] * v[r][0];
                MARLIN_UNROLL
                for (int j = 1; j < 4; ++j) {
                  sum = fma(w.value[4 * c + j], v[r][j], sum);
                }
                sums[r][t][c] = fma(float(sum), scale[r], sums[r][t][c]);
              } else {
                MARLIN_UNROLL
                for (int j = 0; j < 4; ++j) {
                  sums[r][t][c] = fma(float(w.value[4 * c + j]), v[r][j], sums[r][t][c]);
                }
              }
            }
          }
        }
        places.move(tiles_per_row);
      }
    }
  }

  METAL_FUNC void clear() thread {
    MARLIN_UNROLL
    for (int r = 0; r < R; ++r) {
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[r][t][0] = sums[r][t][1] = 0.0f;
      }
    }
  }

  // Adds the four lanes of a column and writes the item's sums.
  METAL_FUNC void store(threadgroup float* out) thread {
    MARLIN_UNROLL
    for (int t = 0; t < T; ++t) {
      MARLIN_UNROLL
      for (int c = 0; c < 2; ++c) {
        MARLIN_UNROLL
        for (int r = 0; r < R; ++r) {
          float v = sums[r][t][c];
          v += simd_shuffle_xor(v, ushort(1));
          v += simd_shuffle_xor(v, ushort(2));
          if (lane % 4 == 0) {
            out[(t * MARLIN_TILE + c * 8 + lane / 4) * R + r] = v;
          }
        }
      }
    }
  }
};

// The same with W^T: the depth runs along a tile's columns and the sums along its rows. Lane l sums the four rows that
// it holds over columns l / 4 and l / 4 + 8. Floats only: it serves gradients.
template <int R, int T, typename X>
struct TransposedProduct {
  device const ushort* codes;
  uint first_tile;  // row of tiles
  X x;
  uint depth;  // tiles in a row of tiles
  uint last_row;
  uint k_begin;
  uint k_end;
  ushort lane;
  uint zero;
  float4 sums[R][T];

  template <int H, int Codebook>
  METAL_FUNC void run() thread {
    constexpr uint tile_size = 8 * H;
    const uint column = lane / 4;
    LanePlaces<H> places = find_places<H>(first_tile * depth + k_begin, lane);
    for (uint k = k_begin; k < k_end; ++k) {
      float2 v[R];
      MARLIN_UNROLL
      for (int r = 0; r < R; ++r) {
        // In tile order columns {c, c + 1, c + 8, c + 9} of an even c are neighbours.
        const float4 four = float4(x.values[(min(uint(r), last_row) * depth + k) * 4 + column / 2]);
        v[r] = column % 2 ? four.yw : four.xz;
      }
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        const LaneWeights w = decode_lane<H, Codebook>(codes + t * depth * tile_size, places, lane, zero);
        MARLIN_UNROLL
        for (int r = 0; r < R; ++r) {
          MARLIN_UNROLL
          for (int j = 0; j < 4; ++j) {
            sums[r][t][j] = fma(float(w.value[j]), v[r].x, sums[r][t][j]);
            sums[r][t][j] = fma(float(w.value[4 + j]), v[r].y, sums[r][t][j]);
          }
        }
      }
      places.move(1);
    }
  }

  METAL_FUNC void clear() thread {
    MARLIN_UNROLL
    for (int r = 0; r < R; ++r) {
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[r][t] = float4(0.0f);
      }
    }
  }

  // Adds the eight lanes that hold the same rows and writes the item's sums.
  METAL_FUNC void store(threadgroup float* out) thread {
    MARLIN_UNROLL
    for (int t = 0; t < T; ++t) {
      MARLIN_UNROLL
      for (int r = 0; r < R; ++r) {
        float4 v = sums[r][t];
        v += simd_shuffle_xor(v, ushort(4));
        v += simd_shuffle_xor(v, ushort(8));
        v += simd_shuffle_xor(v, ushort(16));
        if (lane < 4) {
          MARLIN_UNROLL
          for (int j = 0; j < 4; ++j) {
            out[(t * MARLIN_TILE + 2 * lane + value_offset(j)) * R + r] = v[j];
          }
        }
      }
    }
  }
};

// Products of 8x8 matrices, of which each lane has two elements. The matrices are local: in Metal 4.1 a struct that holds
// one has no default constructor, as the generated one's `this` would be in no particular address space.
template <typename Value>
METAL_FUNC void set_elements(thread simdgroup_matrix<Value, 8, 8>& matrix, vec<Value, 2> pair) {
  matrix.thread_elements()[0] = pair.x;
  matrix.thread_elements()[1] = pair.y;
}

// a * b + sum.
METAL_FUNC float2 multiply_add(vec<Operand, 2> a, vec<Operand, 2> b, float2 sum) {
  simdgroup_matrix<Operand, 8, 8> left, right;
  simdgroup_matrix<float, 8, 8> total;
  set_elements<Operand>(left, a);
  set_elements<Operand>(right, b);
  set_elements<float>(total, sum);
  simdgroup_multiply_accumulate(total, left, right, total);
  return float2(total.thread_elements()[0], total.thread_elements()[1]);
}

// M units of 8 rows times T adjacent tiles on the matrix pipe. The weight pairs of trellis_lane are a lane's elements of
// the four blocks of the transposed tile, so that weights go from registers to the multiplier. Result: [column][row].
template <int M, int T>
struct MatrixProduct {
  typedef vec<Operand, 2> Pair;  // a lane's elements of a matrix of x or of weights

  device const ushort* codes;
  uint first_tile;
  uint tiles_per_row;
  DeviceRows x;    // fragments of the first unit
  uint depth;      // tiles of k
  uint all_units;  // of x
  uint units;      // that have rows, at least 1
  uint k_begin;
  uint k_end;
  ushort lane;  // trellis lane
  uint zero;
  float2 sums[M][T][2];

  METAL_FUNC void set_rows(uint count, uint all) thread {
    units = (count + 7) / 8;
    all_units = all / 8;
  }

  // Units whose x is loaded before a tile is decoded: more would take the registers that decoding needs.
  static constant constexpr const uint kEarly = M < 4 ? M : 4;

  // Units [first, last) of x from `at` on, for 16 values of k. Of units without rows the last one that has any: loads
  // that nothing guards can all be under way at once.
  METAL_FUNC void load(thread Operand4 (&v)[M], uint first, uint last, uint at) const thread {
    const uint last_unit = (units - 1) * MARLIN_SIMD_SIZE;
    MARLIN_UNROLL
    for (uint m = first; m < last; ++m) {
      v[m] = x.values[at + min(m * MARLIN_SIMD_SIZE, last_unit)];
    }
  }

  template <int H, int Codebook>
  METAL_FUNC void run() thread {
    LanePlaces<H> places = find_places<H>(k_begin * tiles_per_row + first_tile, lane);
    for (uint k = k_begin; k < k_end;) {
      const uint stop = same_scale_until(k, k_end);
      if constexpr (half_operands != 0) {
        float2 block[M][T][2];
        zero_sums(block);
        add_tiles<H, Codebook>(block, places, k, stop);
        scale_block(block, k / kBlockTiles);
      } else {
        add_tiles<H, Codebook>(sums, places, k, stop);
      }
      k = stop;
    }
  }

  // Adds the tiles [k, end).
  template <int H, int Codebook>
  METAL_FUNC void add_tiles(thread float2 (&to)[M][T][2], thread LanePlaces<H>& places, uint k, uint end) const thread {
    constexpr uint tile_size = 8 * H;
    const uint step = all_units * MARLIN_SIMD_SIZE;
    uint at = k * step + lane;
    for (; k < end; ++k) {
      Operand4 v[M];
      load(v, 0, kEarly, at);
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        const LaneWeights w = decode_lane<H, Codebook>(codes + t * tile_size, places, lane, zero);
        if (t == 0) {
          load(v, kEarly, M, at);
        }
        MARLIN_UNROLL
        for (uint m = 0; m < M; ++m) {
          if (m < units) {
            MARLIN_UNROLL
            for (int c = 0; c < 2; ++c) {
              const Pair low = Pair(Operand(w.value[4 * c]), Operand(w.value[4 * c + 1]));
              const Pair high = Pair(Operand(w.value[4 * c + 2]), Operand(w.value[4 * c + 3]));
              to[m][t][c] = multiply_add(low, v[m].xy, to[m][t][c]);
              to[m][t][c] = multiply_add(high, v[m].zw, to[m][t][c]);
            }
          }
        }
      }
      at += step;
      places.move(tiles_per_row);
    }
  }

  // Adds a block's sums times its scales; the lane's rows are 2 h and 2 h + 1.
  METAL_FUNC void scale_block(const thread float2 (&block)[M][T][2], uint number) thread {
    MARLIN_UNROLL
    for (uint m = 0; m < M; ++m) {
      if (m < units) {
        const float2 scale = ((device const float2*)x.scales)[(number * all_units + m) * 4 + lane % 4];
        MARLIN_UNROLL
        for (int t = 0; t < T; ++t) {
          MARLIN_UNROLL
          for (int c = 0; c < 2; ++c) {
            sums[m][t][c] = fma(block[m][t][c], scale, sums[m][t][c]);
          }
        }
      }
    }
  }

  METAL_FUNC void clear() thread {
    zero_sums(sums);
  }

  static METAL_FUNC void zero_sums(thread float2 (&to)[M][T][2]) {
    MARLIN_UNROLL
    for (int m = 0; m < M; ++m) {
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        to[m][t][0] = to[m][t][1] = float2(0.0f);
      }
    }
  }

  // Writes the item's sums of one unit: the lane's two rows are adjacent.
  METAL_FUNC void store(threadgroup float* out, uint unit) thread {
    MARLIN_UNROLL
    for (uint m = 0; m < M; ++m) {
      if (m == unit) {
        MARLIN_UNROLL
        for (int t = 0; t < T; ++t) {
          MARLIN_UNROLL
          for (int c = 0; c < 2; ++c) {
            *(threadgroup float2*)(out + (t * MARLIN_TILE + c * 8) * 8 + 2 * lane) = sums[m][t][c];
          }
        }
      }
    }
  }
};
