#include "viterbi/kernel.h"

namespace mlx_marlin::viterbi {
namespace {

// Any machine. Where there is no fused multiply-add in hardware this is slow, but the same.
struct Scalar {
  using Type = float;
  static constexpr int kLanes = 1;
  static constexpr int kTiles = 4;
  static float load(const float* p) {
    return *p;
  }
  static float broadcast(float x) {
    return x;
  }
  static void store(float* p, float x) {
    *p = x;
  }
  static float fma(float a, float b, float c) {
    return std::fma(a, b, c);
  }
  static float min(float a, float b) {
    return b < a ? b : a;
  }
};

}  // namespace

const Encoder* encoders_baseline() {
  return encoders<Scalar>();
}

}  // namespace mlx_marlin::viterbi
