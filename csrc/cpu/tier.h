// What one instruction set offers to the loop nests. tier/table.cpp is compiled once per instruction set
// and fills one of these tables; everything in it lives in a namespace of its own and uses no
// templates of the standard library, so that no code for one set can be linked into another.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "format.h"

namespace mlx_marlin::cpu {

// The inner matrix of one expert. Tile (i, j) starts at tiles + (i * n / 16 + j) * tile_bytes(half_bits).
struct Codes {
  const uint8_t* tiles;
  int half_bits;  // 2 * bits
  int codebook;
  int k;
  int n;
};

constexpr int64_t tile_bytes(int half_bits) {
  return MARLIN_TILE_SIZE / 16 * half_bits;
}

// x between the Hadamard transform and the product lies in blocks of block_rows rows (the last may be
// smaller), each block tile by tile: 16 values of each of its rows, in the order in which a tile
// stores its rows.
struct Tier {
  // out = H(x[0..count) * scale), x zero-extended to size. With tile_stride, the 16 values of each
  // tile go to out + tile * tile_stride in tile order; with 0 the row is stored as it is.
  void (*rotate)(
      DType dtype, const void* x, int count, const uint16_t* scale, int size, int64_t tile_stride, float* out);

  int (*block_rows)(int rows, int panel_rows);

  // y[r][0..columns) = x[r] W[:, column..column + columns), y with stride ldy. At most panel_rows rows
  // share a decoded tile. `scratch` holds multiply_scratch(rows, columns) floats.
  void (*multiply)(
      const Codes& codes, const float* x, int rows, int column, int columns, int panel_rows, float* y, int64_t ldy,
      float* scratch);
  int64_t (*multiply_scratch)(int rows, int columns);

  // y[r][0..columns) = x[r] W^T[:, column..column + columns): x [rows, n], row major.
  void (*multiply_transposed)(
      const Codes& codes, const float* x, int rows, int column, int columns, float* y, int64_t ldy);

  // One block of 128 columns of one row, in place: y = H(y) * scale + bias. bias may be null.
  void (*finish)(float* y, const uint16_t* scale, const float* bias);

  // gate = act(gate) * up.
  void (*activate)(float* gate, const float* up, int count, int activation, float alpha, float limit);

  // y += score * x.
  void (*add_scaled)(float* y, const float* x, float score, int count);

  void (*store)(DType dtype, const float* x, int count, void* out);

  // Rows [16 * tile_row, + 16) of the inner matrix as half, row major.
  void (*decode)(const Codes& codes, int tile_row, uint16_t* out);

  // The first `count` of a group's 256 elements. ring: its scale, then 16 * bits words.
  void (*embed)(DType dtype, const uint16_t* ring, int bits, const uint16_t* signs, int count, void* out);
};

// That of the instruction set in use.
const Tier& tier();

// Where row `row` of a segment of `rows` rows of `size` values begins, and its distance between tiles.
struct RowPlace {
  int64_t begin;
  int64_t tile_stride;
};

inline RowPlace row_place(int row, int rows, int block_rows, int size) {
  int block = row / block_rows * block_rows;
  int count = rows - block < block_rows ? rows - block : block_rows;
  return {static_cast<int64_t>(block) * size + (row - block) * MARLIN_TILE, static_cast<int64_t>(count) * MARLIN_TILE};
}

inline Codes expert_codes(const Stack& stack, int expert) {
  uint32_t format = stack.formats[expert];
  return {
      reinterpret_cast<const uint8_t*>(stack.codes + stack.offsets[expert]),
      static_cast<int>(MARLIN_FORMAT_HALF_BITS(format)), static_cast<int>(MARLIN_FORMAT_CODEBOOK(format)), stack.k,
      stack.n};
}

inline int dtype_bytes(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

}  // namespace mlx_marlin::cpu
