// The activations between gate/up and down. Included by table.cpp only.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

// exp(x) within 2 units in the last place. Beyond the range of float32 it is infinity, and below it 1.1e-38 in place of 0.
// NaN stays NaN.
MARLIN_INLINE V exp(V x) {
  x = min(set1(88.8f), max(set1(-87.4f), x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  V magic = set1(12582912.0f);
  V n = (fma(x, set1(1.44269504f), magic)) - magic;
  // ln 2 in two parts, the first with few enough bits that n times it is exact.
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  // Minimax polynomial of (exp(r) - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2] (Cephes, expf).
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  V value = fma(p, r * r, r + set1(1.0f));
  // n = 128 would leave the exponent's range in one step.
  V half = fma(n, set1(0.5f), magic) - magic;
  return scale_exponent(scale_exponent(value, half), n - half);
}

MARLIN_INLINE V times_sigmoid(V x, V z) {
  return x / (set1(1.0f) + exp(set1(0.0f) - z));
}

// act(x) * up, or with GATED off act(x).
template <int ACTIVATION, bool GATED>
static void activate_row(float* x, const float* up, int count, float alpha, float limit) {
  for (int i = 0; i < count; i += kLanes) {
    V g = load(x + i);
    V factor = set1(1.0f);
    if constexpr (GATED) {
      factor = load(up + i);
    }
    if constexpr (ACTIVATION == MARLIN_ACTIVATION_SILU) {
      g = times_sigmoid(g, g);
    } else if constexpr (ACTIVATION == MARLIN_ACTIVATION_GELU_TANH) {
      // 0.5 * (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3)
      V z = g * fma(g * g, set1(2 * 0.7978845608f * 0.044715f), set1(2 * 0.7978845608f));
      g = times_sigmoid(g, z);
    } else if constexpr (ACTIVATION == MARLIN_ACTIVATION_RELU_SQUARED) {
      // NaN stays NaN: max and min give their second operand then.
      g = max(set1(0.0f), g);
      g = g * g;
    } else {
      g = min(set1(limit), g);
      factor = max(set1(-limit), min(set1(limit), factor)) + set1(1.0f);
      g = times_sigmoid(g, set1(alpha) * g);
    }
    if constexpr (GATED) {
      g = g * factor;
    }
    store(x + i, g);
  }
}

template <bool GATED>
static void activate_as(float* x, const float* up, int count, int activation, float alpha, float limit) {
  switch (activation) {
    case MARLIN_ACTIVATION_SILU:
      return activate_row<MARLIN_ACTIVATION_SILU, GATED>(x, up, count, alpha, limit);
    case MARLIN_ACTIVATION_GELU_TANH:
      return activate_row<MARLIN_ACTIVATION_GELU_TANH, GATED>(x, up, count, alpha, limit);
    case MARLIN_ACTIVATION_RELU_SQUARED:
      return activate_row<MARLIN_ACTIVATION_RELU_SQUARED, GATED>(x, up, count, alpha, limit);
    case MARLIN_ACTIVATION_SWIGLU_OAI:
      return activate_row<MARLIN_ACTIVATION_SWIGLU_OAI, GATED>(x, up, count, alpha, limit);
  }
}

static void activate(float* x, const float* up, int count, int activation, float alpha, float limit) {
  if (up) {
    activate_as<true>(x, up, count, activation, alpha, limit);
  } else {
    activate_as<false>(x, up, count, activation, alpha, limit);
  }
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
