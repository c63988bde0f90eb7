// Tile products: what gate_up, down and linear share.
//
// A threadgroup owns `column_tiles` 16-column tiles of every projection for one row tile. Its work is cut into
// items: a group of T column tiles, one of `k_splits` ranges of k. An item is done by one simdgroup without any
// barrier; the sums of its items then meet in threadgroup memory and are added in the order of k.
#pragma once

#include "activation.h"
#include "trellis.h"

struct RowRange {
  uint expert;
  uint first;  // position
  uint count;
};

METAL_FUNC RowRange find_rows(
    constant MarlinProductArgs& args,
    uint tile,
    uint tile_rows,
    device const uint* indices,
    device const MarlinRowTile* tiles) {
  if (routed) {
    return {tiles[tile].expert, tiles[tile].first, tiles[tile].count};
  }
  const uint first = tile * tile_rows;
  return {indexed ? indices[first] : 0, first, min(tile_rows, args.positions - first)};
}

// One projection's weights of one expert.
struct ExpertWeights {
  device const uint* codes;
  uint format;
};

METAL_FUNC ExpertWeights find_expert(
    device const uint* codes,
    device const long* offsets,
    device const uint* formats,
    uint expert) {
  return {codes + offsets[expert], formats[expert]};
}

// How a threadgroup's items and their sums are numbered. The sums of an item: [16 * T columns][slice_rows].
struct Items {
  uint column_groups;  // per projection
  uint k_splits;
  uint columns;        // per item
  uint slice_rows;

  METAL_FUNC uint count(uint projections) const {
    return projections * column_groups * k_splits;
  }
  METAL_FUNC uint projection(uint item) const {
    return item / (column_groups * k_splits);
  }
  METAL_FUNC uint column_group(uint item) const {
    return item / k_splits % column_groups;
  }
  METAL_FUNC uint k_split(uint item) const {
    return item % k_splits;
  }
  METAL_FUNC uint item_sums() const {
    return columns * slice_rows;
  }
  // A finished sum, added over the ranges of k.
  METAL_FUNC float sum(threadgroup const float* sums, uint projection, uint column, uint row) const {
    const uint first_item = (projection * column_groups + column / columns) * k_splits;
    threadgroup const float* at = sums + first_item * item_sums() + column % columns * slice_rows + row;
    float total = at[0];
    for (uint split = 1; split < k_splits; ++split) {
      total += at[split * item_sums()];
    }
    return total;
  }
  METAL_FUNC float4 block(threadgroup const float* sums, uint projection, uint first, uint row, uint lane) const {
    float4 v;
    MARLIN_UNROLL
    for (uint j = 0; j < 4; ++j) {
      v[j] = sum(sums, projection, first + lane_column(lane) + value_offset(j), row);
    }
    return v;
  }
};

// R rows times T adjacent tiles on the float pipes. Lane l sums columns l / 4 and l / 4 + 8 of each tile over the
// four rows of k that it holds. X: threadgroup or device const float4*.
template <int R, int T, typename X>
struct RowProduct {
  device const ushort* codes;  // of the expert
  uint first_tile;             // column tile
  uint tiles_per_row;
  X x;
  uint row_stride;             // of x, in float4
  uint last_row;               // rows from here on repeat this one: they are not stored
  uint k_begin;                // in tiles
  uint k_end;
  ushort lane;
  uint zero;
  float sums[R][T][2];

  template <int K, int Codebook>
  METAL_FUNC void run() {
    constexpr uint tile_size = 16 * K;
    device const ushort* tile = codes + (ulong(k_begin) * tiles_per_row + first_tile) * tile_size;
    for (uint k = k_begin; k < k_end; ++k) {
      float4 v[R];
      MARLIN_UNROLL
      for (int r = 0; r < R; ++r) {
        v[r] = x[min(uint(r), last_row) * row_stride + k * 4 + lane % 4];
      }
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        const LaneWeights w = decode_lane<K, Codebook>(tile + t * tile_size, lane, zero);
        MARLIN_UNROLL
        for (int r = 0; r < R; ++r) {
          MARLIN_UNROLL
          for (int c = 0; c < 2; ++c) {
            MARLIN_UNROLL
            for (int j = 0; j < 4; ++j) {
              sums[r][t][c] = fma(float(w.value[4 * c + j]), v[r][j], sums[r][t][c]);
            }
          }
        }
      }
      tile += ulong(tiles_per_row) * tile_size;
    }
  }

  METAL_FUNC void clear() {
    MARLIN_UNROLL
    for (int r = 0; r < R; ++r) {
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[r][t][0] = sums[r][t][1] = 0.0f;
      }
    }
  }

  // Adds the four lanes of a column and writes the item's sums.
  METAL_FUNC void store(threadgroup float* out) {
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
// it holds over columns l / 4 and l / 4 + 8.
template <int R, int T, typename X>
struct TransposedProduct {
  device const ushort* codes;
  uint first_tile;  // row of tiles
  uint depth;       // tiles in a row of tiles
  X x;
  uint row_stride;
  uint last_row;
  uint k_begin;
  uint k_end;
  ushort lane;
  uint zero;
  float4 sums[R][T];

  template <int K, int Codebook>
  METAL_FUNC void run() {
    constexpr uint tile_size = 16 * K;
    const uint column = lane / 4;
    for (uint k = k_begin; k < k_end; ++k) {
      float2 v[R];
      MARLIN_UNROLL
      for (int r = 0; r < R; ++r) {
        // In tile order columns {c, c + 1, c + 8, c + 9} of an even c are neighbours.
        const float4 four = x[min(uint(r), last_row) * row_stride + k * 4 + column / 2];
        v[r] = column % 2 ? four.yw : four.xz;
      }
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        device const ushort* tile = codes + (ulong(first_tile + t) * depth + k) * tile_size;
        const LaneWeights w = decode_lane<K, Codebook>(tile, lane, zero);
        MARLIN_UNROLL
        for (int r = 0; r < R; ++r) {
          MARLIN_UNROLL
          for (int j = 0; j < 4; ++j) {
            sums[r][t][j] = fma(float(w.value[j]), v[r].x, sums[r][t][j]);
            sums[r][t][j] = fma(float(w.value[4 + j]), v[r].y, sums[r][t][j]);
          }
        }
      }
    }
  }

  METAL_FUNC void clear() {
    MARLIN_UNROLL
    for (int r = 0; r < R; ++r) {
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[r][t] = float4(0.0f);
      }
    }
  }

  // Adds the eight lanes that hold the same rows and writes the item's sums.
  METAL_FUNC void store(threadgroup float* out) {
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

// M units of 8 rows times T adjacent tiles on the matrix pipe. A lane of an 8x8 matrix holds row f and columns
// 2 h, 2 h + 1 with f, h from its bits; decoding trellis lane 4 f + h makes its weight pairs the elements of the four
// blocks of the transposed tile, so that weights go from registers to the multiplier. Result: [column][row].
template <int M, int T>
struct MatrixProduct {
  device const ushort* codes;
  uint first_tile;
  uint tiles_per_row;
  device const float* x;  // fragments of the first unit
  uint unit_stride;       // floats
  uint units;             // that have rows
  uint k_begin;
  uint k_end;
  ushort lane;            // trellis lane
  uint zero;
  simdgroup_float8x8 sums[M][T][2];

  static METAL_FUNC ushort trellis_lane(ushort lane) {
    const ushort f = (lane / 4 & 4) + (lane / 2 & 3);
    const ushort h = (lane / 4 & 2) + (lane & 1);
    return 4 * f + h;
  }

  template <int K, int Codebook>
  METAL_FUNC void run() {
    constexpr uint tile_size = 16 * K;
    device const ushort* tile = codes + (ulong(k_begin) * tiles_per_row + first_tile) * tile_size;
    for (uint k = k_begin; k < k_end; ++k) {
      simdgroup_float8x8 w[T][2][2];
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        const LaneWeights weights = decode_lane<K, Codebook>(tile + t * tile_size, lane, zero);
        MARLIN_UNROLL
        for (int c = 0; c < 2; ++c) {
          MARLIN_UNROLL
          for (int half_k = 0; half_k < 2; ++half_k) {
            w[t][c][half_k].thread_elements()[0] = float(weights.value[4 * c + 2 * half_k]);
            w[t][c][half_k].thread_elements()[1] = float(weights.value[4 * c + 2 * half_k + 1]);
          }
        }
      }
      MARLIN_UNROLL
      for (uint m = 0; m < M; ++m) {
        if (m < units) {
          MARLIN_UNROLL
          for (uint half_k = 0; half_k < 2; ++half_k) {
            simdgroup_float8x8 v;
            const uint offset = m * unit_stride + (2 * k + half_k) * 64 + 2 * lane;
            const float2 pair = *(device const float2*)(x + offset);
            v.thread_elements()[0] = pair.x;
            v.thread_elements()[1] = pair.y;
            MARLIN_UNROLL
            for (int t = 0; t < T; ++t) {
              MARLIN_UNROLL
              for (int c = 0; c < 2; ++c) {
                simdgroup_multiply_accumulate(sums[m][t][c], w[t][c][half_k], v, sums[m][t][c]);
              }
            }
          }
        }
      }
      tile += ulong(tiles_per_row) * tile_size;
    }
  }

  METAL_FUNC void clear() {
    MARLIN_UNROLL
    for (int m = 0; m < M; ++m) {
      MARLIN_UNROLL
      for (int t = 0; t < T; ++t) {
        sums[m][t][0] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        sums[m][t][1] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      }
    }
  }

  // Writes the item's sums of one unit: the lane's two rows are adjacent.
  METAL_FUNC void store(threadgroup float* out, uint unit) {
    MARLIN_UNROLL
    for (uint m = 0; m < M; ++m) {
      if (m == unit) {
        MARLIN_UNROLL
        for (int t = 0; t < T; ++t) {
          MARLIN_UNROLL
          for (int c = 0; c < 2; ++c) {
            const float2 pair = float2(sums[m][t][c].thread_elements()[0], sums[m][t][c].thread_elements()[1]);
            *(threadgroup float2*)(out + (t * MARLIN_TILE + c * 8) * 8 + 2 * lane) = pair;
          }
        }
      }
    }
  }
};

// Rotates the row tile's rows of x into threadgroup memory, one simdgroup per 128-block; `second` is another
// projection's copy. Rows beyond the tile's are zeros.
template <int R, int Projections>
METAL_FUNC void rotate_rows(
    constant MarlinProductArgs& args,
    RowRange rows,
    device const uchar* x,
    device const uint* order,
    device const half* suh,
    device const half* second_suh,
    threadgroup float4* to,
    uint simdgroup,
    uint simdgroups,
    ushort lane) {
  const uint blocks = args.k / MARLIN_HADAMARD_SIZE;
  const ulong scales = ulong(rows.expert) * args.k;
  for (uint task = simdgroup; task < R * blocks; task += simdgroups) {
    const uint r = task / blocks;
    const uint first = task % blocks * MARLIN_HADAMARD_SIZE;
    float4 v = float4(0.0f);
    float4 second = float4(0.0f);
    if (r < rows.count) {
      uint slot = rows.first + r;
      if (routed) {
        slot = order[slot];
      }
      const float4 row = load_row(x, slot / args.slots_per_row, args.in_columns, first, lane);
      v = hadamard(row * load_halves(suh + scales + first, lane), lane);
      if (Projections == 2) {
        second = hadamard(row * load_halves(second_suh + scales + first, lane), lane);
      }
    }
    const uint at = task * MARLIN_SIMD_SIZE + lane;
    to[at] = v;
    if (Projections == 2) {
      to[R * blocks * MARLIN_SIMD_SIZE + at] = second;
    }
  }
}

// The weights of up to two projections and where their x begins.
template <typename X>
struct Operands {
  ExpertWeights weights[2];
  X x[2];
  uint widths;
  uint codebooks;
};

// Fills in what all products of a threadgroup have in common with an item's place.
template <typename Product, typename X>
METAL_FUNC bool place_item(
    thread Product& product,
    constant MarlinProductArgs& args,
    const thread Operands<X>& operands,
    Items items,
    uint item,
    uint column_group,
    ushort lane) {
  const uint depth = args.k / MARLIN_TILE;
  const uint split = items.k_split(item);
  const uint projection = items.projection(item);
  product.first_tile = column_group * args.column_tiles + items.column_group(item) * (items.columns / MARLIN_TILE);
  product.codes = (device const ushort*)(projection ? operands.weights[1].codes : operands.weights[0].codes);
  product.x = projection ? operands.x[1] : operands.x[0];
  product.k_begin = depth * split / items.k_splits;
  product.k_end = depth * (split + 1) / items.k_splits;
  product.lane = lane;
  product.zero = args.zero;
  return product.first_tile < args.n / MARLIN_TILE;
}

// What only products of single rows need to know.
template <int R, int T, typename X>
METAL_FUNC void place_rows(
    thread RowProduct<R, T, X>& product,
    constant MarlinProductArgs& args,
    uint rows) {
  product.tiles_per_row = args.n / MARLIN_TILE;
  product.row_stride = args.k / 4;
  product.last_row = rows - 1;
}

template <int R, int T, typename X>
METAL_FUNC void place_rows(
    thread TransposedProduct<R, T, X>& product,
    constant MarlinProductArgs& args,
    uint rows) {
  product.depth = args.k / MARLIN_TILE;
  product.row_stride = args.k / 4;
  product.last_row = rows - 1;
}

template <typename Product, int Projections, typename X>
METAL_FUNC void multiply_rows(
    constant MarlinProductArgs& args,
    const thread Operands<X>& operands,
    Items items,
    uint rows,
    uint column_group,
    threadgroup float* sums,
    uint simdgroup,
    uint simdgroups,
    ushort lane) {
  for (uint item = simdgroup; item < items.count(Projections); item += simdgroups) {
    Product product;
    if (place_item(product, args, operands, items, item, column_group, lane)) {
      place_rows(product, args, rows);
      product.clear();
      const uint format = items.projection(item) ? operands.weights[1].format : operands.weights[0].format;
      for_format<1>(product, format, operands.widths, operands.codebooks);
      product.store(sums + item * items.item_sums());
    }
  }
}

// A row tile's products, slice by slice: `finish_slice(first_row, rows)` sees the slice's sums.
template <int R, int T, int Projections, typename X, typename Finish>
METAL_FUNC void row_slices(
    constant MarlinProductArgs& args,
    const thread Operands<X>& operands,
    Items items,
    RowRange rows,
    uint column_group,
    threadgroup float* sums,
    uint simdgroup,
    uint simdgroups,
    ushort lane,
    const thread Finish& finish_slice) {
  bool done = false;
  if constexpr (Projections == 1) {
    if (transposed) {
      multiply_rows<TransposedProduct<R, T, X>, Projections>(
          args, operands, items, rows.count, column_group, sums, simdgroup, simdgroups, lane);
      done = true;
    }
  }
  if (!done) {
    multiply_rows<RowProduct<R, T, X>, Projections>(
        args, operands, items, rows.count, column_group, sums, simdgroup, simdgroups, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  finish_slice.slice(0, rows.count);
}

template <int M, int T, int Projections, typename Finish>
METAL_FUNC void matrix_slices(
    constant MarlinProductArgs& args,
    const thread Operands<device const float*>& operands,
    Items items,
    RowRange rows,
    uint column_group,
    threadgroup float* sums,
    uint simdgroup,
    ushort lane,
    const thread Finish& finish_slice) {
  MatrixProduct<M, T> product;
  product.tiles_per_row = args.n / MARLIN_TILE;
  product.unit_stride = args.k * 8;
  product.units = (rows.count + 7) / 8;
  const ushort trellis_lane = MatrixProduct<M, T>::trellis_lane(lane);
  const bool works = simdgroup < items.count(Projections) &&
      place_item(product, args, operands, items, simdgroup, column_group, trellis_lane);
  if (works) {
    product.clear();
    const uint format = items.projection(simdgroup) ? operands.weights[1].format : operands.weights[0].format;
    for_format<1>(product, format, operands.widths, operands.codebooks);
  }
  for (uint unit = 0; unit < product.units; ++unit) {
    if (unit > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (works) {
      product.store(sums + simdgroup * items.item_sums(), unit);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    finish_slice.slice(unit * 8, min(rows.count - unit * 8, 8u));
  }
}
