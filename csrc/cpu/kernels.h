// The CPU kernels: plain pointers in, plain pointers out. No MLX types, so that they build and run
// alone (the aarch64 tests do). Every function uses up to `threads` workers and returns when done;
// the result does not depend on the number of workers.
#pragma once

#include <cstdint>

namespace mlx_marlin::cpu {

enum class DType { float32, float16, bfloat16 };

// One projection of all experts (python: weights.ExpertStack). k and n are the padded sizes.
struct Stack {
  const uint32_t* codes;
  const int64_t* offsets;   // [experts], in words
  const uint32_t* formats;  // [experts], 2 * bits | codebook << 8
  const uint16_t* suh;      // [experts, k], half
  const uint16_t* svh;      // [experts, n], half
  const float* bias;        // [experts, n] or null
  int experts;
  int k;
  int n;
};

// The CPU's reading of a KernelConfig.
struct Config {
  int panel_rows;             // rows that share one decoded tile: tile_size_m
  int task_columns;           // columns per task: tile_size_n
  int threads;                // simdgroups; clamped to the worker pool
  bool integer_sums = false;  // not use_fp32_acc: mul1 by sums of integers (tier/integer.h)
};

// y[r] = x[r] W(id[r]) + bias for r in [0, rows). With `transposed`, y[r] = x[r] W(id[r])^T (no
// bias): x rows then have out_features elements and y rows in_features.
struct ProductArgs {
  DType dtype;    // of x and y
  const void* x;  // [x_rows, in]; in <= k, zero-extended to k
  void* y;        // [rows, out]; out <= n, the rest is not written
  int64_t rows;
  const uint32_t* ids;  // [rows] expert of each row, or null: all rows use expert 0
  int64_t x_divisor;    // row r reads x row r / x_divisor (top_k, or 1)
  int in_features;
  int out_features;
  bool transposed;
  Stack stack;
};
void product(const ProductArgs& args, const Config& config);

// out[r, s] = down(act(gate(x[r])) * up(x[r])) of expert ids[r, s], or without a gate down(act(up(x[r]))); with scores,
// out[r] = sum over s in slot order of scores[r, s] * (that), summed in float32. Without scores an id may also be the
// number of experts: zeros.
struct SwigluArgs {
  DType dtype;          // of x and out
  const void* x;        // [rows, hidden]
  const uint32_t* ids;  // [rows, top_k]
  const float* scores;  // [rows, top_k] or null
  void* out;            // [rows, top_k, hidden], or [rows, hidden] with scores
  int64_t rows;
  int top_k;
  int hidden;      // logical; up.k is the padded size
  int activation;  // MARLIN_ACTIVATION_*
  float alpha;     // of activations with numbers
  float limit;
  Stack gate;  // without codes where there is none
  Stack up, down;
};
void swiglu(const SwigluArgs& args, const Config& config);

// The inner matrix of one expert, exact: out is half [k, n], row major.
void decode(const Stack& stack, int expert, uint16_t* out, int threads);

// Rows of a quantized token embedding, exact: half values in the dtype of out.
struct EmbeddingArgs {
  DType dtype;          // of out
  const uint32_t* ids;  // [rows], all known to the table
  int64_t rows;
  const uint16_t* codes;  // [vocabulary, groups * (1 + 16 * bits)]
  const uint16_t* signs;  // [groups, 256], half
  void* out;              // [rows, features]
  int features;
  int bits;
};
void embedding(const EmbeddingArgs& args, int threads);

// Elements of four dimensions: batch, head, position, feature. Strides are in elements.
struct Heads {
  const void* data = nullptr;
  int64_t strides[4] = {};
};

// out = softmax(scale * queries keys^T + mask) values, float32 inside. `repeats` heads of queries, one after the other,
// share a head of keys and values.
struct AttentionArgs {
  DType dtype;  // of queries, keys, values and out
  Heads queries, keys, values;
  Heads mask;  // bool (true: look) or float32 (added), batches x query heads x queries x keys; data may be null
  bool mask_is_bool;
  bool causal;         // query i looks at keys up to i + key_count - query_count
  const float* sinks;  // [heads * repeats], scores without a value, or null
  void* out;           // [batches, heads * repeats, query_count, value_size]
  int batches, heads, repeats;
  int query_count;
  int64_t key_count;
  int key_size, value_size;
  float scale;
};
void attention(const AttentionArgs& args, int threads);

// out[0..count) = x[0..count), halves of either kind as float32, on the calling thread alone.
void widen(DType dtype, const uint16_t* x, int64_t count, float* out);

// Largest id of ids[0..count) that is >= experts, as its position, or -1: ids are checked before use.
int64_t find_bad_id(const uint32_t* ids, int64_t count, int experts);

}  // namespace mlx_marlin::cpu
