// Plain loops: one thread, one row at a time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "cpu/kernels.h"
#include "format.h"

namespace mlx_marlin::cpu {

namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  float value;
  if (exponent == 0) {
    value = std::ldexp(float(fraction), -24);
    return sign ? -value : value;
  }
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    float absolute;
    std::memcpy(&absolute, &magnitude, 4);
    return sign | uint16_t(std::nearbyint(std::ldexp(absolute, 24)));
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

float load(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::float16) return half_to_float(h);
  const uint32_t bits = uint32_t(h) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void store(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::float32) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == DType::float16) {
    static_cast<uint16_t*>(data)[i] = float_to_half(value);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    static_cast<uint16_t*>(data)[i] =
        std::isnan(value) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

uint16_t weight(uint32_t state, int codebook) {
  if (codebook == MARLIN_CODEBOOK_MUL1) {
    const uint32_t x = state * 0x83DCD12Du;
    const uint32_t sum = (x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24);
    return float_to_half(
        float((1024.0 + sum) * half_to_float(0x1eee) + double(half_to_float(0xc931))));
  }
  uint32_t x = codebook == MARLIN_CODEBOOK_MCG ? state * 0xCBAC1FEDu : state * 89226354u + 64248484u;
  x = (x & 0x8fff8fff) ^ 0x3b603b60;
  return float_to_half(half_to_float(uint16_t(x)) + half_to_float(uint16_t(x >> 16)));
}

void decode_tile(const uint32_t* words, int bits, int codebook, uint16_t* tile) {
  for (int t = 0; t < MARLIN_TILE_SIZE; ++t) {
    const int start = ((t + 1) * bits - 16 + 256 * bits) % (256 * bits);
    const uint64_t pair = uint64_t(words[start / 32]) << 32 | words[(start / 32 + 1) % (8 * bits)];
    const uint32_t state = uint32_t(pair >> (48 - start % 32)) & 0xffff;
    const int lane = t / 8, q = t % 8;
    const int row = 2 * (lane % 4) + (q & 1) + 8 * (q >> 1 & 1), column = lane / 4 + 8 * (q >> 2);
    tile[row * 16 + column] = weight(state, codebook);
  }
}

void hadamard(std::vector<float>& x) {
  for (size_t block = 0; block < x.size(); block += 128) {
    for (int width = 1; width < 128; width *= 2)
      for (int i = 0; i < 128; ++i)
        if (!(i & width)) {
          const float a = x[block + i], b = x[block + i + width];
          x[block + i] = a + b;
          x[block + i + width] = a - b;
        }
    for (int i = 0; i < 128; ++i) x[block + i] *= 0.08838834764831845f;
  }
}

std::vector<float> multiply(const Stack& s, int expert, std::vector<float> x, bool transposed) {
  const int k = s.k, n = s.n;
  const uint16_t* before = transposed ? s.svh + int64_t(expert) * n : s.suh + int64_t(expert) * k;
  const uint16_t* after = transposed ? s.suh + int64_t(expert) * k : s.svh + int64_t(expert) * n;
  for (size_t i = 0; i < x.size(); ++i) x[i] *= half_to_float(before[i]);
  hadamard(x);
  std::vector<float> y(transposed ? k : n);
  const int bits = MARLIN_FORMAT_BITS(s.formats[expert]);
  uint16_t tile[256];
  for (int i = 0; i < k / 16; ++i)
    for (int j = 0; j < n / 16; ++j) {
      decode_tile(
          s.codes + s.offsets[expert] + (int64_t(i) * (n / 16) + j) * 8 * bits, bits,
          MARLIN_FORMAT_CODEBOOK(s.formats[expert]), tile);
      for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c) {
          const float w = half_to_float(tile[r * 16 + c]);
          if (transposed) y[16 * i + r] += w * x[16 * j + c];
          else y[16 * j + c] += w * x[16 * i + r];
        }
    }
  hadamard(y);
  for (size_t i = 0; i < y.size(); ++i) {
    y[i] *= half_to_float(after[i]);
    if (s.bias && !transposed) y[i] += s.bias[int64_t(expert) * n + i];
  }
  return y;
}

std::vector<float> row_of(const void* x, DType dtype, int64_t row, int size, int padded) {
  std::vector<float> values(padded);
  for (int i = 0; i < size; ++i) values[i] = load(x, dtype, row * size + i);
  return values;
}

float activate(float g, float u, const SwigluArgs& a) {
  if (a.activation == MARLIN_ACTIVATION_SILU) return g / (1 + std::exp(-g)) * u;
  if (a.activation == MARLIN_ACTIVATION_GELU_TANH)
    return 0.5f * g * (1 + std::tanh(0.7978845608f * (g + 0.044715f * g * g * g))) * u;
  g = std::min(g, a.limit);
  u = std::clamp(u, -a.limit, a.limit);
  return g / (1 + std::exp(-a.alpha * g)) * (u + 1);
}

int workers = int(std::thread::hardware_concurrency());

} // namespace

void product(const ProductArgs& a, const Config&) {
  const int in = a.transposed ? a.out_features : a.in_features;
  const int out = a.transposed ? a.in_features : a.out_features;
  for (int64_t r = 0; r < a.rows; ++r) {
    const auto y = multiply(
        a.stack, a.ids ? a.ids[r] : 0,
        row_of(a.x, a.dtype, r / a.x_divisor, in, a.transposed ? a.stack.n : a.stack.k), a.transposed);
    for (int i = 0; i < out; ++i) store(a.y, a.dtype, r * out + i, y[i]);
  }
}

void swiglu(const SwigluArgs& a, const Config&) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const auto x = row_of(a.x, a.dtype, r, a.hidden, a.gate.k);
    std::vector<float> total(a.hidden);
    for (int s = 0; s < a.top_k; ++s) {
      const int expert = a.ids[r * a.top_k + s];
      auto g = multiply(a.gate, expert, x, false);
      const auto u = multiply(a.up, expert, x, false);
      for (size_t i = 0; i < g.size(); ++i) g[i] = activate(g[i], u[i], a);
      const auto y = multiply(a.down, expert, g, false);
      for (int i = 0; i < a.hidden; ++i) {
        if (a.scores) total[i] += a.scores[r * a.top_k + s] * y[i];
        else store(a.out, a.dtype, (r * a.top_k + s) * a.hidden + i, y[i]);
      }
    }
    if (a.scores)
      for (int i = 0; i < a.hidden; ++i) store(a.out, a.dtype, r * a.hidden + i, total[i]);
  }
}

void decode(const Stack& s, int expert, uint16_t* out, int) {
  const int bits = MARLIN_FORMAT_BITS(s.formats[expert]);
  uint16_t tile[256];
  for (int i = 0; i < s.k / 16; ++i)
    for (int j = 0; j < s.n / 16; ++j) {
      decode_tile(
          s.codes + s.offsets[expert] + (int64_t(i) * (s.n / 16) + j) * 8 * bits, bits,
          MARLIN_FORMAT_CODEBOOK(s.formats[expert]), tile);
      for (int r = 0; r < 16; ++r) std::copy_n(tile + 16 * r, 16, out + int64_t(16 * i + r) * s.n + 16 * j);
    }
}

int64_t find_bad_id(const uint32_t* ids, int64_t count, int experts) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] >= uint32_t(experts)) return i;
  return -1;
}

std::vector<std::string> instruction_sets() { return {"baseline"}; }
std::string instruction_set() { return "baseline"; }
void set_instruction_set(const std::string& name) {
  if (name != "auto" && name != "baseline") throw std::invalid_argument("unknown instruction set " + name);
}
void set_threads(int n) { workers = n; }
int threads() { return workers; }

} // namespace mlx_marlin::cpu
