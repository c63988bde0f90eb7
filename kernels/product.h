// Tile products: what gate_up, down and linear share.
//
// A threadgroup owns `column_tiles` 16-column tiles of every projection for one row tile. Its work is cut into
// items: a group of T column tiles, one of `k_splits` ranges of k. An item is done by one simdgroup without any
// barrier; the sums of its items then meet in threadgroup memory and are added in the order of k.
#pragma once

#include "activation.h"
#include "tile_product.h"
#if MARLIN_SOURCE_accelerator
#include "accelerator_product.h"
#endif

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

// How a threadgroup's items and their sums are numbered. The sums of an item: [16 * T columns][slice_rows]. Nothing is
// divided by a number that is not known when the kernel is compiled: these GPUs have no instruction for it.
struct Items {
  uint projections;    // 1 or 2: a constant of the kernel or of its function constants
  uint column_groups;  // per projection
  uint k_splits;
  uint k_splits_inverse;
  uint columns;  // per item
  uint slice_rows;

  METAL_FUNC uint count() const thread {
    return projections * column_groups * k_splits;
  }
  METAL_FUNC bool second(uint item) const thread {
    return projections == 2 && item >= column_groups * k_splits;
  }
  // item / k_splits: exact for items and splits up to 256.
  METAL_FUNC uint group(uint item) const thread {
    return item * k_splits_inverse >> 16;
  }
  METAL_FUNC uint column_group(uint item) const thread {
    return second(item) ? group(item) - column_groups : group(item);
  }
  METAL_FUNC uint k_split(uint item) const thread {
    return item - group(item) * k_splits;
  }
  METAL_FUNC uint item_sums() const thread {
    return columns * slice_rows;
  }
  // The first of a column's sums over ranges of k, which are item_sums() apart.
  METAL_FUNC threadgroup const float* first_sum(threadgroup const float* sums, uint projection, uint column, uint row)
      const thread {
    const uint first_item = (projection * column_groups + column / columns) * k_splits;
    return sums + first_item * item_sums() + column % columns * slice_rows + row;
  }
  // A finished sum, added over the ranges of k.
  METAL_FUNC float sum(threadgroup const float* sums, uint projection, uint column, uint row) const thread {
    threadgroup const float* at = first_sum(sums, projection, column, row);
    float total = at[0];
    for (uint split = 1; split < k_splits; ++split) {
      total += at[split * item_sums()];
    }
    return total;
  }
  // Those of a lane's columns of a block, which are columns of one tile.
  METAL_FUNC float4
  block(threadgroup const float* sums, uint projection, uint first, uint row, uint lane) const thread {
    threadgroup const float* at = first_sum(sums, projection, first + lane_column(lane), row);
    float4 v = four(at);
    for (uint split = 1; split < k_splits; ++split) {
      at += item_sums();
      v += four(at);
    }
    return v;
  }
  METAL_FUNC float4 four(threadgroup const float* at) const thread {
    float4 v;
    MARLIN_UNROLL
    for (uint j = 0; j < 4; ++j) {
      v[j] = at[value_offset(j) * slice_rows];
    }
    return v;
  }
};

// task / blocks, where blocks are those of a threadgroup's columns: one or two.
METAL_FUNC uint row_of_block(uint task, uint blocks) {
  return blocks == 2 ? task / 2 : task;
}

// task / blocks, where there are R * blocks tasks and R is small.
template <int R>
METAL_FUNC uint row_of(uint task, uint blocks) {
  uint row = 0;
  MARLIN_UNROLL
  for (int r = 1; r < R; ++r) {
    row += task >= r * blocks ? 1 : 0;
  }
  return row;
}

// Rotated rows of a row tile in threadgroup memory: `copies` times [R, k] operands, then with halves their scales.
template <int R>
struct LocalBuffer {
  threadgroup float* memory;
  uint k;
  uint copies;

  METAL_FUNC threadgroup float* scales(uint copy) const thread {
    const uint values = copies * R * k * uint(sizeof(Operand)) / uint(sizeof(float));
    return memory + values + copy * R * (k / MARLIN_HADAMARD_SIZE);
  }
  // Block `task` % blocks of row `task` / blocks.
  METAL_FUNC void store(uint copy, uint task, ushort lane, float4 v) const thread {
    threadgroup Operand4* values = (threadgroup Operand4*)memory + copy * R * (k / 4);
    values[task * MARLIN_SIMD_SIZE + lane] = as_operands(v, scales(copy) + task, lane);
  }
  METAL_FUNC LocalRows rows(uint copy) const thread {
    LocalRows found;
    found.values = (threadgroup const Operand4*)memory + copy * R * (k / 4);
    found.scales = scales(copy);
    return found;
  }
};

// The row of x that a position of a row tile reads.
METAL_FUNC uint row_of_x(constant MarlinProductArgs& args, device const uint* order, uint position) {
  uint slot = position;
  if (routed) {
    slot = order[position];
  }
  return slot / args.slots_per_row;
}

// Rotates the row tile's rows of x into threadgroup memory, one simdgroup per 128-block; for two copies also by
// another projection's scales. Rows beyond the tile's are zeros.
template <int R>
METAL_FUNC void rotate_rows(
    constant MarlinProductArgs& args,
    RowRange rows,
    device const uchar* x,
    device const uint* order,
    device const half* suh,
    device const half* second_suh,
    LocalBuffer<R> to,
    uint simdgroup,
    uint simdgroups,
    ushort lane) {
  const uint blocks = args.k / MARLIN_HADAMARD_SIZE;
  const ulong expert = ulong(rows.expert) * args.k;
  const uint first_row = row_of_x(args, order, rows.first);  // a division less in the loop
  for (uint task = simdgroup; task < R * blocks; task += simdgroups) {
    const uint r = row_of<R>(task, blocks);
    const uint first = (task - r * blocks) * MARLIN_HADAMARD_SIZE;
    float4 v = float4(0.0f);
    float4 second = float4(0.0f);
    if (r < rows.count) {
      const uint x_row = R == 1 ? first_row : row_of_x(args, order, rows.first + r);
      const float4 row = load_row(x, x_row, args.in_columns, first, lane);
      v = hadamard(row * load_halves(suh + expert + first, lane), lane);
      if (to.copies == 2) {
        second = hadamard(row * load_halves(second_suh + expert + first, lane), lane);
      }
    }
    to.store(0, task, lane, v);
    if (to.copies == 2) {
      to.store(1, task, lane, second);
    }
  }
}

// The weights and rotated rows of up to two projections. X: DeviceRows or LocalRows.
template <typename X>
struct Operands {
  ExpertWeights weights[2];
  X x[2];
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
  const uint split = items.k_split(item);
  const bool second = items.second(item);
  product.first_tile = column_group * args.column_tiles + items.column_group(item) * (items.columns / MARLIN_TILE);
  product.codes = (device const ushort*)(second ? operands.weights[1].codes : operands.weights[0].codes);
  product.x.values = second ? operands.x[1].values : operands.x[0].values;
  product.x.scales = second ? operands.x[1].scales : operands.x[0].scales;
  product.depth = args.k / MARLIN_TILE;
  product.k_begin = split * args.split_tiles + min(split, args.long_splits);
  product.k_end = product.k_begin + args.split_tiles + (split < args.long_splits ? 1 : 0);
  product.lane = lane;
  product.zero = args.zero;
  return product.first_tile < args.n / MARLIN_TILE;
}

template <typename Product, typename X>
METAL_FUNC void run_item(thread Product& product, const thread Operands<X>& operands, Items items, uint item) {
  product.clear();
  const uint format = items.second(item) ? operands.weights[1].format : operands.weights[0].format;
  for_format<widths, codebooks>(product, format);
}

// What only products with W, not with W^T, need to know.
template <int R, int T, typename X>
METAL_FUNC void set_tiles_per_row(thread RowProduct<R, T, X>& product, uint tiles) {
  product.tiles_per_row = tiles;
}

template <int R, int T, typename X>
METAL_FUNC void set_tiles_per_row(thread TransposedProduct<R, T, X>&, uint) {}

template <typename X, int R, int T, bool Transposed>
struct RowProducts {
  typedef RowProduct<R, T, X> type;
};
template <typename X, int R, int T>
struct RowProducts<X, R, T, true> {
  typedef TransposedProduct<R, T, X> type;
};

// A row tile's products, then `finish_slice(first_row, rows)`, which sees their sums.
template <int R, int T, typename X, typename Finish>
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
  for (uint item = simdgroup; item < items.count(); item += simdgroups) {
    typename RowProducts<X, R, T, transposed != 0>::type product;
    if (place_item(product, args, operands, items, item, column_group, lane)) {
      set_tiles_per_row(product, args.n / MARLIN_TILE);
      product.last_row = rows.count - 1;
      run_item(product, operands, items, item);
      product.store(sums + item * items.item_sums());
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  finish_slice.slice(0, rows.count);
}

// Units of 8 rows times T adjacent tiles, on simdgroup matrices or the accelerators.
#if MARLIN_SOURCE_accelerator
template <int Units, int T>
using UnitProduct = AcceleratorProduct<Units / 2, T>;
#else
template <int Units, int T>
using UnitProduct = MatrixProduct<Units, T>;
#endif

// The same on matrices: a simdgroup has one item, and the sums of 8 rows at a time go through threadgroup memory.
template <int M, int T, typename Finish>
METAL_FUNC void matrix_slices(
    constant MarlinProductArgs& args,
    const thread Operands<DeviceRows>& operands,
    Items items,
    RowRange rows,
    uint column_group,
    threadgroup float* sums,
    uint simdgroup,
    ushort lane,
    const thread Finish& finish_slice) {
  UnitProduct<M, T> product;
  product.tiles_per_row = args.n / MARLIN_TILE;
  product.set_rows(rows.count, position_rows(args.positions));
  const bool works = simdgroup < items.count() &&
      place_item(product, args, operands, items, simdgroup, column_group, trellis_lane(lane));
  if (works) {
    run_item(product, operands, items, simdgroup);
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
