// Tile products: what gate_up, down and linear share.
//
// A threadgroup owns `column_tiles` 16-column tiles of every projection for one row tile. Its work is cut into
// items: a group of T column tiles, one of `k_splits` ranges of k. An item is done by one simdgroup without any
// barrier; the sums of its items then meet in threadgroup memory and are added in the order of k.
#pragma once

#include "activation.h"
#include "tile_product.h"

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

METAL_FUNC ExpertWeights
find_expert(device const uint* codes, device const long* offsets, device const uint* formats, uint expert) {
  return {codes + offsets[expert], formats[expert]};
}

// How a threadgroup's items and their sums are numbered. The sums of an item: [16 * T columns][slice_rows].
struct Items {
  uint column_groups;  // per projection
  uint k_splits;
  uint columns;  // per item
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
METAL_FUNC void place_rows(thread RowProduct<R, T, X>& product, constant MarlinProductArgs& args, uint rows) {
  product.tiles_per_row = args.n / MARLIN_TILE;
  product.row_stride = args.k / 4;
  product.last_row = rows - 1;
}

template <int R, int T, typename X>
METAL_FUNC void place_rows(thread TransposedProduct<R, T, X>& product, constant MarlinProductArgs& args, uint rows) {
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
