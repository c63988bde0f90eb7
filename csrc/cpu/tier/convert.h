// Activations in memory <-> vectors of float32. Included by table.cpp only.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

template <DType T>
MARLIN_INLINE V load_as(const void* p, int64_t i) {
  if constexpr (T == DType::float32) {
    return load(static_cast<const float*>(p) + i);
  } else if constexpr (T == DType::float16) {
    return load_half(static_cast<const uint16_t*>(p) + i);
  } else {
    return load_bfloat(static_cast<const uint16_t*>(p) + i);
  }
}

template <DType T>
MARLIN_INLINE void store_as(void* p, int64_t i, V v) {
  if constexpr (T == DType::float32) {
    store(static_cast<float*>(p) + i, v);
  } else if constexpr (T == DType::float16) {
    store_half(static_cast<uint16_t*>(p) + i, v);
  } else {
    store_bfloat(static_cast<uint16_t*>(p) + i, v);
  }
}

constexpr int bytes(DType t) {
  return t == DType::float32 ? 4 : 2;
}

template <DType T>
static void store_row(const float* x, int count, void* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_as<T>(out, i, load(x + i));
  }
  if (i < count) {
    alignas(64) float tail[kLanes] = {};
    alignas(64) char converted[kLanes * 4];
    std::memcpy(tail, x + i, (count - i) * sizeof(float));
    store_as<T>(converted, 0, load(tail));
    std::memcpy(static_cast<char*>(out) + static_cast<int64_t>(i) * bytes(T), converted, (count - i) * bytes(T));
  }
}

static void store(DType dtype, const float* x, int count, void* out) {
  switch (dtype) {
    case DType::float32:
      return store_row<DType::float32>(x, count, out);
    case DType::float16:
      return store_row<DType::float16>(x, count, out);
    case DType::bfloat16:
      return store_row<DType::bfloat16>(x, count, out);
  }
}

template <DType T>
static void widen_as(const uint16_t* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, load_as<T>(x, i));
  }
  if (i < count) {
    alignas(64) uint16_t tail[kLanes] = {};
    alignas(64) float converted[kLanes];
    std::memcpy(tail, x + i, (count - i) * sizeof(uint16_t));
    store(converted, load_as<T>(tail, 0));
    std::memcpy(out + i, converted, (count - i) * sizeof(float));
  }
}

static void widen(DType dtype, const uint16_t* x, int64_t count, float* out) {
  return dtype == DType::float16 ? widen_as<DType::float16>(x, count, out) : widen_as<DType::bfloat16>(x, count, out);
}

static void add_scaled(float* y, const float* x, float score, int count) {
  V s = set1(score);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, fma(s, load(x + i), load(y + i)));
  }
  for (; i < count; ++i) {
    y[i] += score * x[i];
  }
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
