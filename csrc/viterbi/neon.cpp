#if defined(__aarch64__)
#include <arm_neon.h>

#include "viterbi/kernel.h"

namespace mlx_marlin::viterbi {
namespace {

struct Neon {
  using Type = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kTiles = 4;
  static float32x4_t load(const float* p) {
    return vld1q_f32(p);
  }
  static float32x4_t broadcast(float x) {
    return vdupq_n_f32(x);
  }
  static void store(float* p, float32x4_t x) {
    vst1q_f32(p, x);
  }
  static float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) {
    return vfmaq_f32(c, a, b);
  }
  static float32x4_t min(float32x4_t a, float32x4_t b) {
    return vminq_f32(a, b);
  }
  // a0 b0 a1 b1 ...
  static void zip(float32x4_t a, float32x4_t b, float32x4_t& low, float32x4_t& high) {
    low = vzip1q_f32(a, b);
    high = vzip2q_f32(a, b);
  }
};

}  // namespace

const Encoder* encoders_neon() {
  return encoders<Neon>();
}

}  // namespace mlx_marlin::viterbi
#endif
