// Between gate/up and down.
#pragma once

#include "hadamard.h"

// The smaller one; NaN stays NaN.
METAL_FUNC float below(float x, float limit) {
  return x > limit ? limit : x;
}

// By the formulas of ops.trellis_swiglu. precise:: because the fast versions overflow to NaN where the exact ones saturate.
METAL_FUNC float activate(float x, float alpha, float limit) {
  if (activation == MARLIN_ACTIVATION_SILU) {
    return x / (1.0f + precise::exp(-x));
  }
  if (activation == MARLIN_ACTIVATION_GELU_TANH) {
    // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), Hendrycks and Gimpel, 2016.
    const float inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + precise::tanh(inner));
  }
  if (activation == MARLIN_ACTIVATION_RELU_SQUARED) {
    return x < 0.0f ? 0.0f : x * x;  // NaN stays NaN
  }
  if (activation == MARLIN_ACTIVATION_SWIGLU_STEP) {
    return below(x / (1.0f + precise::exp(-x)), limit);
  }
  if (activation == MARLIN_ACTIVATION_SITU) {
    return alpha * precise::tanh(x / alpha) / (1.0f + precise::exp(-x));
  }
  const float g = below(x, limit);
  const float slope = activation == MARLIN_ACTIVATION_SWIGLU_OAI ? alpha : 1.0f;
  return g / (1.0f + precise::exp(-slope * g));
}

// What the activated gate is multiplied with.
METAL_FUNC float gated_factor(float up, float limit) {
  if (activation == MARLIN_ACTIVATION_SITU) {
    return limit * precise::tanh(up / limit);
  }
  const float clamped = up < -limit ? -limit : below(up, limit);
  if (activation == MARLIN_ACTIVATION_SWIGLU_OAI) {
    return clamped + 1.0f;
  }
  return activation == MARLIN_ACTIVATION_SWIGLU_CLAMPED || activation == MARLIN_ACTIVATION_SWIGLU_STEP ? clamped : up;
}

// What follows the Hadamard transform of a product.
METAL_FUNC float4 finish(float4 sums, device const half* svh, device const float* bias, bool has_bias, ushort lane) {
  float4 v = hadamard(sums, lane) * load_halves(svh, lane);
  return has_bias ? v + load_floats(bias, lane) : v;
}

// What turns sums of the projections of x into down's rotated input. What there is no second projection for is not set.
struct SumsFinish {
  device const half* svh;
  device const half* second_svh;
  device const float* biases;
  device const float* second_biases;
  device const half* down_suh;

  // A 128-block of sums, its scales from `at` on.
  METAL_FUNC float4
  block(float4 sums, float4 second_sums, ulong at, float alpha, float limit, ushort lane) const thread {
    device const float* bias = nullptr;
    if (first_bias) {
      bias = biases + at;
    }
    float4 v = finish(sums, svh + at, bias, first_bias, lane);
    float4 up = float4(0.0f);
    if (gated) {
      device const float* second_b = nullptr;
      if (second_bias) {
        second_b = second_biases + at;
      }
      up = finish(second_sums, second_svh + at, second_b, second_bias, lane);
    }
    MARLIN_UNROLL
    for (int j = 0; j < 4; ++j) {
      v[j] = activate(v[j], alpha, limit);
      if (gated) {
        v[j] *= gated_factor(up[j], limit);
      }
    }
    return hadamard(v * load_halves(down_suh + at, lane), lane);
  }
};
