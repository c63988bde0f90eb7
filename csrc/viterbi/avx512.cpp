#if defined(__x86_64__)
// GCC 12 warns about its own _mm512_min_ps.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "viterbi/kernel.h"

namespace mlx_marlin::viterbi {
namespace {

struct Avx512 {
  using Type = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTiles = 4;
  static __m512 load(const float* p) {
    return _mm512_load_ps(p);
  }
  static __m512 broadcast(float x) {
    return _mm512_set1_ps(x);
  }
  static void store(float* p, __m512 x) {
    _mm512_store_ps(p, x);
  }
  static __m512 fma(__m512 a, __m512 b, __m512 c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static __m512 min(__m512 a, __m512 b) {
    return _mm512_min_ps(a, b);
  }
  // a0 b0 a1 b1 ...
  static void zip(__m512 a, __m512 b, __m512& low, __m512& high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    low = _mm512_permutex2var_ps(a, first, b);
    high = _mm512_permutex2var_ps(a, second, b);
  }
};

}  // namespace

const Encoder* encoders_avx512() {
  return encoders<Avx512>();
}

}  // namespace mlx_marlin::viterbi
#endif
