// mul1 as words for sums of integers (tier/integer.h). Included by avx512.h.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

using W = __m512i;  // words of 16 bits
using I = __m512i;  // sums of 32 bits

constexpr int kWords = 32;
constexpr int kCopies = 1;         // of x
constexpr int kGroupSums = 1;      // of columns `group` and `group` + 8: eight lanes each
constexpr int kRegisterSums = 24;  // beside 4 vectors of words, 1 of x and a product in 32 registers

struct WordDecoder {
  explicit WordDecoder(const Codes& codes) : reader(codes) {
    // Hidden from the optimizer, which would else rebuild them in the loop.
    asm("" : "+v"(low_multiplier), "+v"(high_multiplier), "+v"(ones));
  }

  template <bool FIRST>
  MARLIN_INLINE void words(const uint8_t* tile, int group, W* out) const {
    const __m512i state = reader.template states<FIRST>(tile, group);
    const __m512i low = _mm512_mullo_epi16(state, low_multiplier);
    const __m512i high =
        _mm512_add_epi16(_mm512_mulhi_epu16(state, low_multiplier), _mm512_mullo_epi16(state, high_multiplier));
    *out = _mm512_add_epi16(_mm512_maddubs_epi16(low, ones), _mm512_maddubs_epi16(high, ones));
  }

  int bytes() const {  // of a tile
    return reader.reader.bytes();
  }

 private:
  StateReader reader;
  __m512i low_multiplier = set1_word(MARLIN_MUL1_MULTIPLIER);
  __m512i high_multiplier = set1_word(MARLIN_MUL1_MULTIPLIER >> 16);
  __m512i ones = _mm512_set1_epi8(1);
};

MARLIN_INLINE void store_words(const int16_t* tile, int16_t* out) {
  std::memcpy(out, tile, MARLIN_TILE * sizeof(int16_t));
}

// A column's 16 rows for both columns.
MARLIN_INLINE W load_words(const int16_t* x, int) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

MARLIN_INLINE void add_products(W w, W x, I* sums) {
#if defined(__AVX512VNNI__)
  *sums = _mm512_dpwssd_epi32(*sums, w, x);
#else
  *sums = _mm512_add_epi32(*sums, _mm512_madd_epi16(w, x));
#endif
}

MARLIN_INLINE V to_floats(I sums) {
  return _mm512_cvtepi32_ps(sums);
}

// y[0..16) = the sums of the groups, per column.
MARLIN_INLINE void sum_word_chains(const V* groups, float* y) {
  V quads[2];  // of four groups; 128 bits hold their sums, of the columns themselves twice, then of those 8 further
  unroll<2>([&](auto q) MARLIN_LAMBDA {
    auto pair = [&](int g) {
      V a = groups[4 * q + g], b = groups[4 * q + g + 1];
      return _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    };
    __m512d ab = pair(0), cd = pair(2);
    quads[q] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  });
  // Columns 0 to 3, 8 to 11, 4 to 7 and 12 to 15.
  V sums = _mm512_shuffle_f32x4(quads[0], quads[1], 0x88) + _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd);
  store(y, _mm512_shuffle_f32x4(sums, sums, 0xd8));
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
