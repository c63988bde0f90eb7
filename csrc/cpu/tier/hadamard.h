// The Hadamard transforms around a product. Included by table.cpp only.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

constexpr int kBlockVectors = MARLIN_HADAMARD_SIZE / kLanes;

template <int S>
MARLIN_INLINE void butterflies_in_vector(V* v) {
  if constexpr (S < kLanes) {
    unroll<kBlockVectors>([&](auto i) MARLIN_LAMBDA { v[i] = butterfly<S>(v[i]); });
    butterflies_in_vector<2 * S>(v);
  }
}

template <int S>
MARLIN_INLINE void butterflies_of_vectors(V* v) {
  if constexpr (S < kBlockVectors) {
    unroll<kBlockVectors / 2>([&](auto i) MARLIN_LAMBDA {
      constexpr int low = i / S * 2 * S + i % S;
      V a = v[low], b = v[low + S];
      v[low] = a + b;
      v[low + S] = a - b;
    });
    butterflies_of_vectors<2 * S>(v);
  }
}

// Natural order, widths 1, 2, ... 64, divided by sqrt(128).
MARLIN_INLINE void hadamard(V* v) {
  butterflies_in_vector<1>(v);
  butterflies_of_vectors<1>(v);
  V scale = set1(0.088388347648f);
  unroll<kBlockVectors>([&](auto i) MARLIN_LAMBDA { v[i] = v[i] * scale; });
}

template <DType T>
static void rotate_block(const void* x, int64_t begin, const uint16_t* scale, int64_t tile_stride, float* out) {
  V v[kBlockVectors];
  for (int i = 0; i < kBlockVectors; ++i) {
    v[i] = load_as<T>(x, begin + i * kLanes) * load_half(scale + begin + i * kLanes);
  }
  hadamard(v);
  if (!tile_stride) {
    for (int i = 0; i < kBlockVectors; ++i) {
      store(out + i * kLanes, v[i]);
    }
    return;
  }
  constexpr int vectors = MARLIN_TILE / kLanes;
  for (int i = 0; i < kBlockVectors; i += vectors) {
    store_tile_order(v + i, out + i / vectors * tile_stride);
  }
}

template <DType T>
static void rotate_row(const void* x, int count, const uint16_t* scale, int size, int64_t tile_stride, float* out) {
  const int64_t block = tile_stride ? MARLIN_HADAMARD_SIZE / MARLIN_TILE * tile_stride : MARLIN_HADAMARD_SIZE;
  int64_t whole = count / MARLIN_HADAMARD_SIZE * MARLIN_HADAMARD_SIZE;
  for (int64_t begin = 0; begin < whole; begin += MARLIN_HADAMARD_SIZE, out += block) {
    rotate_block<T>(x, begin, scale, tile_stride, out);
  }
  if (whole < size) {  // the format pads to the next multiple of 128: one block is partly filled
    alignas(64) char padded[MARLIN_HADAMARD_SIZE * 4] = {};
    std::memcpy(padded, static_cast<const char*>(x) + whole * bytes(T), (count - whole) * bytes(T));
    rotate_block<T>(padded, 0, scale + whole, tile_stride, out);
  }
}

// With tile_stride, the 16 values of each tile go to out + tile * tile_stride in tile order; with 0 the row is stored as it
// is.
static void rotate_to(
    DType dtype, const void* x, int count, const uint16_t* scale, int size, int64_t tile_stride, float* out) {
  switch (dtype) {
    case DType::float32:
      return rotate_row<DType::float32>(x, count, scale, size, tile_stride, out);
    case DType::float16:
      return rotate_row<DType::float16>(x, count, scale, size, tile_stride, out);
    case DType::bfloat16:
      return rotate_row<DType::bfloat16>(x, count, scale, size, tile_stride, out);
  }
}

// As the exact product (gemm.h) reads it.
static void rotate_rows(DType dtype, const void* x, int count, const uint16_t* scale, int size, const RowPlace& to) {
  const int most = block_rows(to.rows, to.panel_rows);
  const int first = to.row / most * most;
  const int64_t stride = static_cast<int64_t>(to.rows - first < most ? to.rows - first : most) * MARLIN_TILE;
  float* block = to.segment + static_cast<int64_t>(first) * to.k;
  rotate_to(
      dtype, x, count, scale, size, stride, block + (to.row - first) * MARLIN_TILE + to.column / MARLIN_TILE * stride);
}

static void rotate(DType dtype, const void* x, int count, const uint16_t* scale, int size, float* out) {
  rotate_to(dtype, x, count, scale, size, 0, out);
}

static void finish(float* y, const uint16_t* scale, const float* bias) {
  V v[kBlockVectors];
  for (int i = 0; i < kBlockVectors; ++i) {
    v[i] = load(y + i * kLanes);
  }
  hadamard(v);
  for (int i = 0; i < kBlockVectors; ++i) {
    V scaled = v[i] * load_half(scale + i * kLanes);
    store(y + i * kLanes, bias ? scaled + load(bias + i * kLanes) : scaled);
  }
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
