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

// Where a row of x goes once it is rotated: row `row`, from column `column` on (a multiple of 128), of the `rows` rows of
// `k` values that a segment has from `segment` on.
struct RowPlace {
  float* segment;
  int rows;
  int row;
  int k;
  int column;
  int panel_rows;  // the config's: the layout of x depends on it
};

// A way to multiply. x between the Hadamard transform and the product has a layout of its own.
struct Arithmetic {
  int64_t (*row_floats)(int k);  // room for a row of x

  // H(x[0..count) * scale), x zero-extended to size, goes to its place.
  void (*rotate)(DType dtype, const void* x, int count, const uint16_t* scale, int size, const RowPlace& to);

  // y[r][0..columns) = x[r] W[:, column..column + columns) for the rows of a segment, y with stride ldy. At most
  // panel_rows rows share a decoded tile. `scratch` holds multiply_scratch(rows, columns) floats.
  void (*multiply)(
      const Codes& codes, float* x, int rows, int column, int columns, int panel_rows, float* y, int64_t ldy,
      float* scratch);
  int64_t (*multiply_scratch)(int rows, int columns);
};

// Rows [row, row + rows) of the queries that share a head of keys, position by position, over keys [first_key, last_key).
struct AttentionTask {
  int batch, head;  // of keys
  int row, rows;
  int64_t first_key, last_key;
};

struct Tier {
  Arithmetic exact;    // values as the format says, products and sums in float32
  Arithmetic integer;  // mul1 only: tier/integer.h

  // out = H(x[0..count) * scale), x zero-extended to size: for multiply_transposed.
  void (*rotate)(DType dtype, const void* x, int count, const uint16_t* scale, int size, float* out);

  // y[r][0..columns) = x[r] W^T[:, column..column + columns): x [rows, n], row major.
  void (*multiply_transposed)(
      const Codes& codes, const float* x, int rows, int column, int columns, float* y, int64_t ldy);

  // One block of 128 columns of one row, in place: y = H(y) * scale + bias. bias may be null.
  void (*finish)(float* y, const uint16_t* scale, const float* bias);

  // x = act(x) * up, or act(x) where up is null.
  void (*activate)(float* x, const float* up, int count, int activation, float alpha, float limit);

  // y += score * x.
  void (*add_scaled)(float* y, const float* x, float score, int count);

  void (*store)(DType dtype, const float* x, int count, void* out);

  // out = x, halves of either kind.
  void (*widen)(DType dtype, const uint16_t* x, int64_t count, float* out);

  // Rows [16 * tile_row, + 16) of the inner matrix as half, row major.
  void (*decode)(const Codes& codes, int tile_row, uint16_t* out);

  // The first `count` of a group's 256 elements. ring: its scale, then 16 * bits words.
  void (*embed)(DType dtype, const uint16_t* ring, int bits, const uint16_t* signs, int count, void* out);

  // Attention in two steps: each task leaves a state of attention_state(args, rows) floats, and those of all keys,
  // `stride` floats apart, become rows of the output. `scratch` holds attention_scratch(args, rows) floats.
  void (*attend)(const AttentionArgs& args, const AttentionTask& task, float* scratch, float* state);
  void (*finish_attention)(
      const AttentionArgs& args, const AttentionTask& task, float* states, int64_t stride, int parts);
  int64_t (*attention_state)(const AttentionArgs& args, int rows);
  int64_t (*attention_scratch)(const AttentionArgs& args, int rows);
};

// That of the instruction set in use.
const Tier& tier();

inline Codes expert_codes(const Stack& stack, int expert) {
  uint32_t format = stack.formats[expert];
  return {
      reinterpret_cast<const uint8_t*>(stack.codes + stack.offsets[expert]),
      static_cast<int>(MARLIN_FORMAT_HALF_BITS(format)), static_cast<int>(MARLIN_FORMAT_CODEBOOK(format)), stack.k,
      stack.n};
}

// How the product with an expert's weight is computed.
inline const Arithmetic& arithmetic(const Tier& tier, const Config& config, const Stack& stack, int expert) {
  const bool mul1 = MARLIN_FORMAT_CODEBOOK(stack.formats[expert]) == MARLIN_CODEBOOK_MUL1;
  return config.integer_sums && mul1 ? tier.integer : tier.exact;
}

// Room for a rotated row, whichever expert it is for.
inline int64_t row_floats(const Tier& tier, const Config& config, int k) {
  const int64_t exact = tier.exact.row_floats(k), integer = tier.integer.row_floats(k);
  return config.integer_sums && integer > exact ? integer : exact;
}

inline int dtype_bytes(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

}  // namespace mlx_marlin::cpu
