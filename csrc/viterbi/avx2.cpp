#if defined(__x86_64__)
#include <immintrin.h>

#include "viterbi/kernel.h"

namespace mlx_marlin::viterbi {
namespace {

struct Avx2 {
  using Type = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTiles = 2;  // 16 registers: accumulators, targets and one value
  static __m256 load(const float* p) {
    return _mm256_load_ps(p);
  }
  static __m256 broadcast(float x) {
    return _mm256_set1_ps(x);
  }
  static void store(float* p, __m256 x) {
    _mm256_store_ps(p, x);
  }
  static __m256 fma(__m256 a, __m256 b, __m256 c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static __m256 min(__m256 a, __m256 b) {
    return _mm256_min_ps(a, b);
  }
  // a0 b0 a1 b1 ...
  static void zip(__m256 a, __m256 b, __m256& low, __m256& high) {
    const __m256 even = _mm256_unpacklo_ps(a, b);
    const __m256 odd = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(even, odd, 0x20);
    high = _mm256_permute2f128_ps(even, odd, 0x31);
  }
};

}  // namespace

const Encoder* encoders_avx2() {
  return encoders<Avx2>();
}

}  // namespace mlx_marlin::viterbi
#endif
