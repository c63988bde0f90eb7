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

// out = x.
template <DType FROM, DType TO>
static void convert_row(const void* x, int64_t count, void* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_as<TO>(out, i, load_as<FROM>(x, i));
  }
  if (i < count) {
    alignas(64) char tail[kLanes * 4] = {};
    alignas(64) char converted[kLanes * 4];
    std::memcpy(tail, static_cast<const char*>(x) + i * bytes(FROM), (count - i) * bytes(FROM));
    store_as<TO>(converted, 0, load_as<FROM>(tail, 0));
    std::memcpy(static_cast<char*>(out) + i * bytes(TO), converted, (count - i) * bytes(TO));
  }
}

static void store(DType dtype, const float* x, int count, void* out) {
  switch (dtype) {
    case DType::float32:
      return convert_row<DType::float32, DType::float32>(x, count, out);
    case DType::float16:
      return convert_row<DType::float32, DType::float16>(x, count, out);
    case DType::bfloat16:
      return convert_row<DType::float32, DType::bfloat16>(x, count, out);
  }
}

static void widen(DType dtype, const uint16_t* x, int64_t count, float* out) {
  return dtype == DType::float16 ? convert_row<DType::float16, DType::float32>(x, count, out)
                                 : convert_row<DType::bfloat16, DType::float32>(x, count, out);
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
