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

// tanh(x) within 5 units in the last place; NaN stays NaN. The rational approximation of degree 13 and 6 that Eigen has
// (MathFunctionsImpl.h, ptanh_float), on the range outside of which float32 has nothing but +-1.
MARLIN_INLINE V tanh(V x) {
  x = min(set1(7.90531111f), max(set1(-7.90531111f), x));
  V square = x * x;
  V p = fma(set1(-2.76076847742355e-16f), square, set1(2.00018790482477e-13f));
  p = fma(p, square, set1(-8.60467152213735e-11f));
  p = fma(p, square, set1(5.12229709037114e-08f));
  p = fma(p, square, set1(1.48572235717979e-05f));
  p = fma(p, square, set1(6.37261928875436e-04f));
  p = fma(p, square, set1(4.89352455891786e-03f));
  V q = fma(set1(1.19825839466702e-06f), square, set1(1.18534705686654e-04f));
  q = fma(q, square, set1(2.26843463243900e-03f));
  q = fma(q, square, set1(4.89352518554385e-03f));
  return x * p / q;
}

MARLIN_INLINE V clamp(V x, float limit) {
  return max(set1(-limit), min(set1(limit), x));
}

// By the formulas of ops.trellis_swiglu: act(x) * up, or with GATED off act(x).
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
    } else if constexpr (ACTIVATION == MARLIN_ACTIVATION_SWIGLU_OAI) {
      g = min(set1(limit), g);
      factor = clamp(factor, limit) + set1(1.0f);
      g = times_sigmoid(g, set1(alpha) * g);
    } else if constexpr (ACTIVATION == MARLIN_ACTIVATION_SWIGLU_CLAMPED) {
      g = min(set1(limit), g);
      factor = clamp(factor, limit);
      g = times_sigmoid(g, g);
    } else if constexpr (ACTIVATION == MARLIN_ACTIVATION_SWIGLU_STEP) {
      factor = clamp(factor, limit);
      g = min(set1(limit), times_sigmoid(g, g));
    } else {
      g = times_sigmoid(set1(alpha) * tanh(g / set1(alpha)), g);
      factor = set1(limit) * tanh(factor / set1(limit));
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
    case MARLIN_ACTIVATION_SWIGLU_CLAMPED:
      return activate_row<MARLIN_ACTIVATION_SWIGLU_CLAMPED, GATED>(x, up, count, alpha, limit);
    case MARLIN_ACTIVATION_SWIGLU_STEP:
      return activate_row<MARLIN_ACTIVATION_SWIGLU_STEP, GATED>(x, up, count, alpha, limit);
    case MARLIN_ACTIVATION_SITU:
      return activate_row<MARLIN_ACTIVATION_SITU, GATED>(x, up, count, alpha, limit);
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
