// Softmax attention of some query rows over some keys. Included by table.cpp only.
//
// Scores are held transposed, one row of them per key: the lanes of a vector are query rows. Queries are transposed once
// and keys never, and the softmax needs no sum across lanes.
#pragma once

#include <cfloat>

namespace mlx_marlin::cpu::MARLIN_TIER {

// Keys that are scored before their values are added up: 48 rows of 128 values of V (24 KB) stay in the L1 cache. A
// multiple of every kPanelBlock.
constexpr int kKeyBlock = 48;

MARLIN_INLINE int64_t whole_vectors(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// Rows of A are strided, their elements too: A may be the transpose of what is stored.
struct LeftOperand {
  const float* data;
  int64_t row, step;
};

// c[ROWS][VECTORS * kLanes] += a b, b [steps][...].
template <int ROWS, int VECTORS>
static void add_product_block(const LeftOperand& a, const float* b, int64_t ldb, int steps, float* c, int64_t ldc) {
  V sums[ROWS * VECTORS];
  unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
    unroll<VECTORS>([&](auto v) MARLIN_LAMBDA { sums[r * VECTORS + v] = load(c + r * ldc + v * kLanes); });
  });
  const float* left = a.data;
  for (int s = 0; s < steps; ++s, left += a.step, b += ldb) {
    V right[VECTORS];
    unroll<VECTORS>([&](auto v) MARLIN_LAMBDA { right[v] = load(b + v * kLanes); });
    unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
      V value = set1(left[r * a.row]);
      unroll<VECTORS>([&](auto v)
                          MARLIN_LAMBDA { sums[r * VECTORS + v] = fma(value, right[v], sums[r * VECTORS + v]); });
    });
  }
  unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
    unroll<VECTORS>([&](auto v) MARLIN_LAMBDA { store(c + r * ldc + v * kLanes, sums[r * VECTORS + v]); });
  });
}

// rows in [1, ROWS].
template <int ROWS, int VECTORS>
static void add_product_rows(
    const LeftOperand& a, int rows, const float* b, int64_t ldb, int steps, float* c, int64_t ldc) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) {
      return add_product_rows<ROWS - 1, VECTORS>(a, rows, b, ldb, steps, c, ldc);
    }
    add_product_block<ROWS, VECTORS>(a, b, ldb, steps, c, ldc);
  }
}

// vectors in [1, VECTORS].
template <int VECTORS>
static void add_product_columns(
    const LeftOperand& a, int rows, int vectors, const float* b, int64_t ldb, int steps, float* c, int64_t ldc) {
  if constexpr (VECTORS > 0) {
    if (vectors < VECTORS) {
      return add_product_columns<VECTORS - 1>(a, rows, vectors, b, ldb, steps, c, ldc);
    }
    LeftOperand block = a;
    for (int r = 0; r < rows; r += kPanelBlock, block.data += kPanelBlock * a.row, c += kPanelBlock * ldc) {
      const int count = rows - r < kPanelBlock ? rows - r : kPanelBlock;
      add_product_rows<kPanelBlock, VECTORS>(block, count, b, ldb, steps, c, ldc);
    }
  }
}

// c[rows][columns] += a[rows][steps] b[steps][columns], columns a multiple of kLanes.
static void add_product(
    const LeftOperand& a, int rows, int columns, const float* b, int64_t ldb, int steps, float* c, int64_t ldc) {
  constexpr int block = kPanelChains * kLanes;
  for (int i = 0; i < columns; i += block) {
    const int count = columns - i < block ? columns - i : block;
    add_product_columns<kPanelChains>(a, rows, count / kLanes, b + i, ldb, steps, c + i, ldc);
  }
}

template <DType T>
static void load_row_as(const char* x, int64_t stride, int count, float* out) {
  int i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) {
      store(out + i, load_as<T>(x, i));
    }
  }
  for (; i < count; ++i) {
    alignas(64) char one[kLanes * 4] = {};
    alignas(64) float value[kLanes];
    std::memcpy(one, x + i * stride * bytes(T), bytes(T));
    store(value, load_as<T>(one, 0));
    out[i] = value[0];
  }
}

static void load_row(DType dtype, const char* x, int64_t stride, int count, float* out) {
  switch (dtype) {
    case DType::float32:
      return load_row_as<DType::float32>(x, stride, count, out);
    case DType::float16:
      return load_row_as<DType::float16>(x, stride, count, out);
    case DType::bfloat16:
      return load_row_as<DType::bfloat16>(x, stride, count, out);
  }
}

MARLIN_INLINE const char* heads_row(DType dtype, const Heads& heads, int batch, int head, int64_t position) {
  const int64_t element = batch * heads.strides[0] + head * heads.strides[1] + position * heads.strides[2];
  return static_cast<const char*>(heads.data) + element * dtype_bytes(dtype);
}

// Rows of a head of keys or values as float32: where they lie, or else converted, zero-extended to whole vectors.
struct DenseRows {
  const float* data;
  int64_t stride;

  DenseRows(DType dtype, const Heads& heads, int batch, int head, int64_t first, int count, int size, float* buffer) {
    const int64_t whole = whole_vectors(size);
    if (dtype == DType::float32 && heads.strides[3] == 1 && whole == size) {
      data = reinterpret_cast<const float*>(heads_row(dtype, heads, batch, head, first));
      stride = heads.strides[2];
      return;
    }
    for (int i = 0; i < count; ++i) {
      float* row = buffer + i * whole;
      load_row(dtype, heads_row(dtype, heads, batch, head, first + i), heads.strides[3], size, row);
      std::memset(row + size, 0, (whole - size) * sizeof(float));
    }
    data = buffer;
    stride = whole;
  }
};

// What a task leaves: [rows][value_size, whole vectors] sums of values, then per lane the maximum of its scores and the
// sum of their exponentials.
struct AttentionState {
  float *sums, *maximum, *total;

  AttentionState(const AttentionArgs& args, int rows, float* data)
      : sums(data), maximum(data + rows * whole_vectors(args.value_size)), total(maximum + whole_vectors(rows)) {}
};

static int64_t attention_state(const AttentionArgs& args, int rows) {
  return rows * whole_vectors(args.value_size) + 2 * whole_vectors(rows);
}

static int64_t attention_scratch(const AttentionArgs& args, int rows) {
  const int64_t width = whole_vectors(rows);
  const int64_t key = whole_vectors(args.key_size), value = whole_vectors(args.value_size);
  return width * (args.key_size + kKeyBlock + 1) + kKeyBlock * (key > value ? key : value);
}

// Query rows are numbered position by position, the heads that share keys together.
MARLIN_INLINE int query_head(const AttentionArgs& args, const AttentionTask& task, int row) {
  return task.head * args.repeats + (task.row + row) % args.repeats;
}

MARLIN_INLINE int query_position(const AttentionArgs& args, const AttentionTask& task, int row) {
  return (task.row + row) / args.repeats;
}

// q[key_size][width] = the queries, scaled and transposed; lanes beyond the rows are zero.
static void load_queries(const AttentionArgs& args, const AttentionTask& task, int64_t width, float* buffer, float* q) {
  std::memset(q, 0, args.key_size * width * sizeof(float));
  for (int r = 0; r < task.rows; ++r) {
    const char* row =
        heads_row(args.dtype, args.queries, task.batch, query_head(args, task, r), query_position(args, task, r));
    load_row(args.dtype, row, args.queries.strides[3], args.key_size, buffer);
    for (int d = 0; d < args.key_size; ++d) {
      q[d * width + r] = buffer[d] * args.scale;
    }
  }
}

// The last key, exclusive, that a causal row may look at.
MARLIN_INLINE int64_t causal_end(const AttentionArgs& args, const AttentionTask& task, int row) {
  return args.key_count - args.query_count + query_position(args, task, row) + 1;
}

// Masked scores become the lowest finite float: a row that may look at nothing weighs all keys alike, as in MLX.
static void mask_scores(
    const AttentionArgs& args, const AttentionTask& task, int64_t first, int count, int64_t width, float* scores) {
  if (args.causal && first + count > causal_end(args, task, 0)) {
    for (int r = 0; r < task.rows; ++r) {
      const int64_t end = causal_end(args, task, r) - first;
      for (int64_t k = end < 0 ? 0 : end; k < count; ++k) {
        scores[k * width + r] = -FLT_MAX;
      }
    }
  }
  const Heads& mask = args.mask;
  if (!mask.data) {
    return;
  }
  for (int r = 0; r < task.rows; ++r) {
    const int64_t row = task.batch * mask.strides[0] + query_head(args, task, r) * mask.strides[1] +
        query_position(args, task, r) * mask.strides[2] + first * mask.strides[3];
    for (int k = 0; k < count; ++k) {
      const int64_t at = row + k * mask.strides[3];
      float& score = scores[k * width + r];
      if (args.mask_is_bool) {
        score = static_cast<const bool*>(mask.data)[at] ? score : -FLT_MAX;
      } else {
        score += static_cast<const float*>(mask.data)[at];
      }
    }
  }
}

// exp(x), x <= 0, that ends at zero: exp ends at its smallest normal number, whose products with values would be denormal,
// which take a hundred times as long.
MARLIN_INLINE V weight_of(V x) {
  return exp(x) - exp(set1(-FLT_MAX));
}

// scores = exp(scores - maximum). factors: by how much what was summed so far shrinks.
static void exponentials(int count, int64_t width, float* scores, const AttentionState& state, float* factors) {
  for (int64_t v = 0; v < width; v += kLanes) {
    const V before = load(state.maximum + v);
    V maximum = before;
    for (int k = 0; k < count; ++k) {
      maximum = max(load(scores + k * width + v), maximum);
    }
    maximum = max(set1(-FLT_MAX), maximum);  // scores of -infinity only: no infinity less infinity
    V total = set1(0.0f);
    for (int k = 0; k < count; ++k) {
      const V weight = weight_of(load(scores + k * width + v) - maximum);
      store(scores + k * width + v, weight);
      total = total + weight;
    }
    const V factor = weight_of(before - maximum);
    store(factors + v, factor);
    store(state.total + v, fma(load(state.total + v), factor, total));
    store(state.maximum + v, maximum);
  }
}

static void start_state(const AttentionArgs& args, const AttentionTask& task, const AttentionState& state) {
  std::memset(state.sums, 0, task.rows * whole_vectors(args.value_size) * sizeof(float));
  for (int64_t r = 0; r < whole_vectors(task.rows); ++r) {
    // A sink is a score without a value. It counts once, with the first keys.
    const bool sink = args.sinks && task.first_key == 0 && r < task.rows;
    state.maximum[r] = sink ? args.sinks[query_head(args, task, r)] : -__builtin_inff();
    state.total[r] = sink ? 1.0f : 0.0f;
  }
}

static void attend(const AttentionArgs& args, const AttentionTask& task, float* scratch, float* data) {
  const int64_t width = whole_vectors(task.rows), value_size = whole_vectors(args.value_size);
  const AttentionState state(args, task.rows, data);
  float* q = scratch;
  float* scores = q + args.key_size * width;
  float* factors = scores + kKeyBlock * width;
  float* buffer = factors + width;
  load_queries(args, task, width, buffer, q);
  start_state(args, task, state);
  // Keys that no row may look at are left out, where every row may look at one.
  const bool leave_out = args.causal && args.query_count <= args.key_count;
  const int64_t seen = leave_out ? causal_end(args, task, task.rows - 1) : args.key_count;
  const int64_t end = task.last_key < seen ? task.last_key : seen;
  for (int64_t first = task.first_key; first < end; first += kKeyBlock) {
    const int count = static_cast<int>(end - first < kKeyBlock ? end - first : kKeyBlock);
    std::memset(scores, 0, count * width * sizeof(float));
    const DenseRows keys(args.dtype, args.keys, task.batch, task.head, first, count, args.key_size, buffer);
    add_product({keys.data, keys.stride, 1}, count, width, q, width, args.key_size, scores, width);
    mask_scores(args, task, first, count, width, scores);
    exponentials(count, width, scores, state, factors);
    for (int r = 0; r < task.rows; ++r) {
      if (factors[r] != 1.0f) {
        float* sums = state.sums + r * value_size;
        for (int64_t v = 0; v < value_size; v += kLanes) {
          store(sums + v, load(sums + v) * set1(factors[r]));
        }
      }
    }
    const DenseRows values(args.dtype, args.values, task.batch, task.head, first, count, args.value_size, buffer);
    add_product({scores, 1, width}, task.rows, value_size, values.data, values.stride, count, state.sums, value_size);
  }
}

// `parts` states, `stride` floats apart, of the same rows over different keys: into the output.
static void finish_attention(
    const AttentionArgs& args, const AttentionTask& task, float* states, int64_t stride, int parts) {
  const int64_t value_size = whole_vectors(args.value_size);
  const AttentionState whole(args, task.rows, states);
  for (int p = 1; p < parts; ++p) {
    const AttentionState part(args, task.rows, states + p * stride);
    for (int64_t v = 0; v < whole_vectors(task.rows); v += kLanes) {
      const V a = load(whole.maximum + v), b = load(part.maximum + v), maximum = max(a, max(b, set1(-FLT_MAX)));
      // The factors take the place of what they are made from.
      const V left = weight_of(a - maximum), right = weight_of(b - maximum);
      store(whole.total + v, fma(load(whole.total + v), left, load(part.total + v) * right));
      store(whole.maximum + v, maximum);
      store(part.maximum + v, left);
      store(part.total + v, right);
    }
    for (int r = 0; r < task.rows; ++r) {
      const V left = set1(part.maximum[r]), right = set1(part.total[r]);
      for (int64_t v = r * value_size; v < (r + 1) * value_size; v += kLanes) {
        store(whole.sums + v, fma(load(whole.sums + v), left, load(part.sums + v) * right));
      }
    }
  }
  for (int r = 0; r < task.rows; ++r) {
    float* sums = whole.sums + r * value_size;
    for (int64_t v = 0; v < value_size; v += kLanes) {
      store(sums + v, load(sums + v) / set1(whole.total[r]));
    }
    const int64_t row =
        (static_cast<int64_t>(task.batch) * args.heads * args.repeats + query_head(args, task, r)) * args.query_count +
        query_position(args, task, r);
    store(
        args.dtype, sums, args.value_size,
        static_cast<char*>(args.out) + row * args.value_size * dtype_bytes(args.dtype));
  }
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
