// Between gate/up and down.
#pragma once

#include "hadamard.h"

// precise:: because the fast versions overflow to NaN where the exact ones saturate.
METAL_FUNC float activate(float gate, float up, float alpha, float limit) {
  if (activation == MARLIN_ACTIVATION_SILU) {
    return gate / (1.0f + precise::exp(-gate)) * up;
  }
  if (activation == MARLIN_ACTIVATION_GELU_TANH) {
    // 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))), Hendrycks and Gimpel, 2016.
    const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + precise::tanh(inner)) * up;
  }
  // gpt-oss: gate clamped above, up on both sides, (up + 1) gate sigmoid(alpha gate).
  const float g = min(gate, limit);
  const float u = clamp(up, -limit, limit);
  return g / (1.0f + precise::exp(-alpha * g)) * (u + 1.0f);
}

// What follows the Hadamard transform of a product.
METAL_FUNC float4 finish(float4 sums, device const half* svh, device const float* bias, bool has_bias, ushort lane) {
  float4 v = hadamard(sums, lane) * load_halves(svh, lane);
  return has_bias ? v + load_floats(bias, lane) : v;
}

// A 128-block of gate and up sums -> the same block of down's rotated input.
METAL_FUNC float4
activate_block(float4 gate, float4 up, device const half* down_suh, float alpha, float limit, ushort lane) {
  float4 v;
  MARLIN_UNROLL
  for (int j = 0; j < 4; ++j) {
    v[j] = activate(gate[j], up[j], alpha, limit);
  }
  return hadamard(v * load_halves(down_suh, lane), lane);
}
