// What one instruction set offers to the loop nests. tier.cpp is compiled once per instruction set
// and fills one of these tables; everything in it lives in a namespace of its own and uses no
// templates of the standard library, so that no code for one set can be linked into another.
#pragma once

#include <cstdint>

#include "../format.h"
#include "kernels.h"

namespace mlx_marlin::cpu {

// The inner matrix of one expert. Tile (i, j) starts at tiles + (i * n / 16 + j) * 32 * bits.
struct Codes {
  const uint8_t* tiles;
  int bits;
  int codebook;
  int k;
  int n;
};

// Rows between the Hadamard transform and the product are in tile order: within each 16, the order in
// which a tile stores its rows.
struct Tier {
  const char* name;
  // out[0..size) = H(x[0..count) * scale), x zero-extended to size.
  void (*rotate)(DType dtype, const void* x, int count, const uint16_t* scale, int size,
                 bool tile_order, float* out);

  // y[r][0..columns) = x[r] W[:, column..column + columns): x [rows, k] in tile order, y with stride
  // ldy. At most panel_rows rows share a decoded tile. `scratch` holds
  // multiply_scratch(rows, columns) floats.
  void (*multiply)(const Codes& codes, const float* x, int rows, int column, int columns,
                   int panel_rows, float* y, int64_t ldy, float* scratch);
  int64_t (*multiply_scratch)(int rows, int columns);

  // y[r][0..columns) = x[r] W^T[:, column..column + columns): x [rows, n] in natural order.
  void (*multiply_transposed)(const Codes& codes, const float* x, int rows, int column, int columns,
                              float* y, int64_t ldy);

  // One block of 128 columns of one row, in place: y = H(y) * scale + bias. bias may be null.
  void (*finish)(float* y, const uint16_t* scale, const float* bias);

  // gate = act(gate) * up.
  void (*activate)(float* gate, const float* up, int count, int activation, float alpha, float limit);

  // y += score * x.
  void (*add_scaled)(float* y, const float* x, float score, int count);

  void (*store)(DType dtype, const float* x, int count, void* out);

  // Rows [16 * tile_row, + 16) of the inner matrix as half, row major.
  void (*decode)(const Codes& codes, int tile_row, uint16_t* out);
};

// The tier in use.
const Tier& tier();

inline Codes expert_codes(const Stack& stack, int expert) {
  uint32_t format = stack.formats[expert];
  return {reinterpret_cast<const uint8_t*>(stack.codes + stack.offsets[expert]),
          static_cast<int>(MARLIN_FORMAT_BITS(format)),
          static_cast<int>(MARLIN_FORMAT_CODEBOOK(format)), stack.k, stack.n};
}

inline int dtype_bytes(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

} // namespace mlx_marlin::cpu
