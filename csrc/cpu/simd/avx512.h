// Vectors of sixteen floats: AVX-512 F, BW, DQ and VL, and VBMI, VNNI and FP16 where the compiler's flags have them.
#pragma once

#include <immintrin.h>

#include "cpu/simd/tile.h"

namespace mlx_marlin::cpu::MARLIN_TIER {

using V = __m512;

constexpr int kLanes = 16;

MARLIN_INLINE V load(const float* p) {
  return _mm512_loadu_ps(p);
}

MARLIN_INLINE void store(float* p, V v) {
  _mm512_storeu_ps(p, v);
}

MARLIN_INLINE V set1(float x) {
  return _mm512_set1_ps(x);
}

MARLIN_INLINE V fma(V a, V b, V c) {
  return _mm512_fmadd_ps(a, b, c);
}

// min and max return b where a or b is NaN.
MARLIN_INLINE V min(V a, V b) {
  return _mm512_min_ps(a, b);
}

MARLIN_INLINE V max(V a, V b) {
  return _mm512_max_ps(a, b);
}

MARLIN_INLINE V load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

MARLIN_INLINE void store_half(uint16_t* p, V v) {
  __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}

MARLIN_INLINE V load_bfloat(const uint16_t* p) {
  __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

MARLIN_INLINE void store_bfloat(uint16_t* p, V v) {
  __m512i u = _mm512_castps_si512(v);
  __m512i high = _mm512_srli_epi32(u, 16);
  __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(rounded, 16), nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

// Butterfly of lanes S apart: the lower lane gets a + b, the upper a - b.
template <int S>
MARLIN_INLINE V butterfly(V v) {
  constexpr uint16_t upper = S == 1 ? 0xaaaa : S == 2 ? 0xcccc : S == 4 ? 0xf0f0 : 0xff00;
  V swapped;
  if constexpr (S == 1) {
    swapped = _mm512_permute_ps(v, 0xb1);
  } else if constexpr (S == 2) {
    swapped = _mm512_permute_ps(v, 0x4e);
  } else if constexpr (S == 4) {
    swapped = _mm512_shuffle_f32x4(v, v, 0xb1);
  } else {
    swapped = _mm512_shuffle_f32x4(v, v, 0x4e);
  }
  return _mm512_fmadd_ps(v, _mm512_mask_blend_ps(upper, set1(1.0f), set1(-1.0f)), swapped);
}

// v * 2^n for integral n.
MARLIN_INLINE V scale_exponent(V v, V n) {
  return _mm512_scalef_ps(v, n);
}

// A chain holds one column, a step all 16 rows.
constexpr int kSteps = 1;
constexpr int kChains = 16;
// Register block of the product from memory: rows x chains. 24 sums, 4 weights and 1 x in 32 registers.
constexpr int kPanelBlock = 6;
constexpr int kPanelChains = 4;
// From this many rows on, a sweep is decoded into memory and multiplied from there.
constexpr int kPanelRows = 9;
// From this many rows on, packing and multiplying are interleaved: measured, one row takes longer.
constexpr int kInterleavedRows = 2;

constexpr int lane_row(int, int, int lane) {
  return kTileRows[lane];
}

constexpr int lane_column(int, int chain, int) {
  return chain / 2 + 8 * (chain % 2);
}

MARLIN_INLINE V load_step(const float* x, int) {
  return load(x);
}

// x holds one value per column of a tile.
MARLIN_INLINE V load_column(const float* x, int chain) {
  return set1(x[lane_column(0, chain, 0)]);
}

// One column of a tile in tile order, from natural order.
MARLIN_INLINE void store_tile_order(const V* natural, float* out) {
  store(out, _mm512_permutexvar_ps(_mm512_loadu_si512(kTileRows), natural[0]));
}

// y[0..16) = the sums of the chains, per column.
MARLIN_INLINE void sum_chains(const V* chains, float* y) {
  V quads[4];
  unroll<4>([&](auto q) MARLIN_LAMBDA {
    auto pair = [&](int column) {
      auto chain = [](int c) { return 2 * (c % 8) + c / 8; };
      V a = chains[chain(column)], b = chains[chain(column + 1)];
      return _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    };
    __m512d ab = pair(4 * q), cd = pair(4 * q + 2);
    quads[q] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  });
  auto fold = [](V a, V b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); };
  store(y, fold(fold(quads[0], quads[1]), fold(quads[2], quads[3])));
}

// y[0..16) += the sums of the steps, per row, in tile order.
MARLIN_INLINE void add_steps(const V* steps, float* y) {
  store(y, load(y) + steps[0]);
}

// How 32 states, columns `group` and `group` + 8 of a tile, are cut out of the words from the group's first on.
struct alignas(64) Windows {
#if defined(__AVX512VBMI__)
  // Each 64-bit lane takes the 8 bytes that hold its 4 states, in the order of the stream; `shift`
  // picks each state's two bytes out of them.
  uint8_t gather[64];
  uint8_t shift[64];
#else
  // The two stream words of 16 bits that hold a state, and how far it reaches into them.
  uint16_t first[32];
  uint16_t second[32];
  uint16_t left[32];
  uint16_t right[32];
#endif

  // Of even groups or, with parity 1, of odd ones.
  constexpr Windows(int half_bits, int parity) : Windows() {
    auto end_of = [&](int position) {
      return window_end(half_bits, 32 * parity + position) - 8 * group_begin(half_bits, parity);
    };
    for (int lane = 0; lane < 32; ++lane) {
      int half = lane / 16, quad = lane % 16 / 4;
      int position = 8 * quad + 4 * half;
#if defined(__AVX512VBMI__)
      int first_byte = (end_of(position) - 16) / 8;
      int low = 64 - (end_of(position + lane % 4) - 8 * first_byte);
      shift[2 * lane] = static_cast<uint8_t>(low);
      shift[2 * lane + 1] = static_cast<uint8_t>(low + 8);
      for (int i = 0; i < 2; ++i) {
        int at = 2 * (lane % 4) + i;
        gather[2 * lane + i] = static_cast<uint8_t>((first_byte + 7 - at) ^ 3);
      }
#else
      int begin = end_of(position + lane % 4) - 16;
      first[lane] = static_cast<uint16_t>(begin / 16 ^ 1);
      second[lane] = static_cast<uint16_t>((begin / 16 + 1) ^ 1);
      left[lane] = static_cast<uint16_t>(begin % 16);
      right[lane] = static_cast<uint16_t>(16 - begin % 16);
#endif
    }
  }

#if defined(__AVX512VBMI__)
  constexpr Windows() : gather{}, shift{} {}
#else
  constexpr Windows() : first{}, second{}, left{}, right{} {}
#endif
};

inline constexpr WindowTable<Windows> kWindows;

// Rounds to the 11 significant bits of a half; scaled = v * 8193, rounded. That is where 8192 v + v loses the bits of v
// that a half does not have, and subtracting 8192 v rounds nothing. Exact for every value of every codebook: the tests
// compare all states.
MARLIN_INLINE V round_to_half(V v, V scaled) {
  return fma(v, set1(-8192.0f), scaled);
}

// 32 weights, columns `group` and `group` + 8 of a tile, on their way through the L1 cache: a conversion
// that loads needs no shuffle to reach the upper half, and port 5 is the bottleneck. Halves; without
// FP16 what is left of each weight before its rounding: 1024 + s for mul1, else two halves to be added.
template <int CODEBOOK>
struct alignas(64) Packed {
#if defined(__AVX512FP16__)
  static constexpr int kVectors = 1;
#else
  static constexpr int kVectors = CODEBOOK == MARLIN_CODEBOOK_MUL1 ? 1 : 2;
#endif
  uint16_t words[kVectors][32];

  MARLIN_INLINE void put(int vector, __m512i v) {
    _mm512_store_si512(words[vector], v);
    asm("" : "+m"(words[vector]));  // or the optimizer would replace the loads by shuffles
  }

  MARLIN_INLINE V get(int vector, int half) const {
    const void* from = words[vector] + 16 * half;
    return _mm512_cvtph_ps(_mm256_load_si256(static_cast<const __m256i*>(from)));
  }
};

MARLIN_INLINE __m512i set1_word(uint32_t x) {
  return _mm512_set1_epi16(static_cast<int16_t>(x & 0xffff));
}

// The constants of a codebook. Hidden from the optimizer, which would else rebuild them in the loop.
template <int CODEBOOK>
struct Constants {
  static constexpr bool kMul1 = CODEBOOK == MARLIN_CODEBOOK_MUL1;
  static constexpr uint32_t kMultiplier = kMul1 ? MARLIN_MUL1_MULTIPLIER : kHalvesMultiplier<CODEBOOK>;

  __m512i low_multiplier = set1_word(kMultiplier);
  __m512i high_multiplier = set1_word(kMultiplier >> 16);
#if defined(__AVX512FP16__)
  // Twice the byte sum s, at most 2040, read as a half is s * 2^-23: times 2^23 * scale, plus
  // the offset, rounded once.
  static constexpr int kByteWeight = 2;
  __m512i a = set1_word(kMul1 ? half_bits(0x1p23f * kMul1Scale) : MARLIN_HALVES_MASK);
  __m512i b = set1_word(kMul1 ? half_bits(kMul1Offset) : MARLIN_HALVES_XOR);
#else
  static constexpr int kByteWeight = 1;
  __m512i a = set1_word(kMul1 ? 0x6400 : MARLIN_HALVES_MASK);  // 1024 + s as a half
  __m512i b = set1_word(kMul1 ? 0 : MARLIN_HALVES_XOR);
#endif
  __m512i c = kMul1 ? _mm512_set1_epi8(kByteWeight) : set1_word(MARLIN_HALVES_XOR >> 16);

  Constants() {
    asm("" : "+v"(low_multiplier), "+v"(high_multiplier), "+v"(a), "+v"(b), "+v"(c));
  }
};

// Reads the words that hold a group's windows.
struct GroupReader {
  explicit GroupReader(const Codes& codes) : pair_bytes(4 * codes.half_bits) {
    for (int parity = 0; parity < 2; ++parity) {
      offset[parity] = group_begin(codes.half_bits, parity);
      const int bytes = (parity + 1) * pair_bytes / 2 - offset[parity];
      present[parity] = static_cast<__mmask16>((1u << (bytes + 3) / 4) - 1);
    }
    present_first = present[0] & ~1u;
  }

  template <bool FIRST>
  MARLIN_INLINE __m512i words(const uint8_t* tile, int group) const {
    if constexpr (FIRST) {  // the word before the tile's first is its last
      uint32_t last;
      std::memcpy(&last, tile + bytes() - 4, 4);
      __m512i words = _mm512_maskz_loadu_epi32(present_first, tile - 4);
      return _mm512_mask_set1_epi32(words, 1, static_cast<int>(last));
    } else {
      return _mm512_maskz_loadu_epi32(present[group % 2], tile + group / 2 * pair_bytes + offset[group % 2]);
    }
  }

  int bytes() const {  // of a tile
    return 4 * pair_bytes;
  }

  int pair_bytes;  // of two groups
  int offset[2];   // of even and of odd groups from the first byte of the pair
  __mmask16 present[2], present_first;
};

// Reads the states of a group, 16 of column `group`, then 16 of `group` + 8.
struct StateReader {
  explicit StateReader(const Codes& codes) : reader(codes) {
    const Windows(&windows)[2] = kWindows.by_width[codes.half_bits];
    for (int parity = 0; parity < 2; ++parity) {
#if defined(__AVX512VBMI__)
      gather[parity] = _mm512_load_si512(windows[parity].gather);
#else
      first[parity] = _mm512_load_si512(windows[parity].first);
      second[parity] = _mm512_load_si512(windows[parity].second);
#endif
    }
    // Even and odd groups differ in whole words of 16 bits only.
#if defined(__AVX512VBMI__)
    shift = _mm512_load_si512(windows[0].shift);
#else
    left = _mm512_load_si512(windows[0].left);
    right = _mm512_load_si512(windows[0].right);
#endif
  }

  template <bool FIRST>
  MARLIN_INLINE __m512i states(const uint8_t* tile, int group) const {
    const __m512i words = reader.template words<FIRST>(tile, group);
#if defined(__AVX512VBMI__)
    return _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(gather[group % 2], words));
#else
    __m512i high = _mm512_sllv_epi16(_mm512_permutexvar_epi16(first[group % 2], words), left);
    __m512i low = _mm512_srlv_epi16(_mm512_permutexvar_epi16(second[group % 2], words), right);
    return _mm512_or_si512(high, low);
#endif
  }

  GroupReader reader;
#if defined(__AVX512VBMI__)
  __m512i gather[2], shift;
#else
  __m512i first[2], second[2], left, right;
#endif
};

template <int CODEBOOK>
struct Decoder {
  explicit Decoder(const Codes& codes) : reader(codes) {}

  template <bool FIRST>
  MARLIN_INLINE void pack(const uint8_t* tile, int group, Packed<CODEBOOK>& packed) const {
    put(hash(reader.template states<FIRST>(tile, group)), packed);
  }

  MARLIN_INLINE void unpack(const Packed<CODEBOOK>& packed, V* out) const {
    unroll<2>([&](auto half) MARLIN_LAMBDA {
#if defined(__AVX512FP16__)
      out[half] = packed.get(0, half);
#else
      if constexpr (CODEBOOK == MARLIN_CODEBOOK_MUL1) {
        // 8193 v, rounded, less 8192 v: see round_to_half. Both are exact before that: all terms are short multiples of
        // 2^-18.
        constexpr float scale = kMul1Scale, offset = kMul1Offset - 1024 * kMul1Scale;
        V s = packed.get(0, half);
        out[half] = fma(s, set1(8193 * scale), set1(8193 * offset)) - fma(s, set1(8192 * scale), set1(8192 * offset));
      } else {
        V v = packed.get(0, half) + packed.get(1, half);  // exact: the exponents differ by 3 at most
        out[half] = round_to_half(v, v * set1(8193.0f));
      }
#endif
    });
  }

  int bytes() const {  // of a tile
    return reader.reader.bytes();
  }

 private:
  struct Product {
    __m512i low, high;  // the 16-bit halves of 32 products
  };

  MARLIN_INLINE Product hash(__m512i state) const {
    __m512i low = _mm512_mullo_epi16(state, constants.low_multiplier);
    __m512i high = _mm512_add_epi16(
        _mm512_mulhi_epu16(state, constants.low_multiplier), _mm512_mullo_epi16(state, constants.high_multiplier));
    if constexpr (CODEBOOK == MARLIN_CODEBOOK_3INST) {
      constexpr uint32_t increment = kHalvesIncrement<CODEBOOK>;
      low = _mm512_add_epi16(low, set1_word(increment));
      __mmask32 carry = _mm512_cmplt_epu16_mask(low, set1_word(increment));
      high = _mm512_add_epi16(high, set1_word(increment >> 16));
      high = _mm512_mask_sub_epi16(high, carry, high, _mm512_set1_epi16(-1));
    }
    return {low, high};
  }

  MARLIN_INLINE void put(Product x, Packed<CODEBOOK>& packed) const {
    if constexpr (CODEBOOK == MARLIN_CODEBOOK_MUL1) {
      __m512i sum =
          _mm512_add_epi16(_mm512_maddubs_epi16(x.low, constants.c), _mm512_maddubs_epi16(x.high, constants.c));
#if defined(__AVX512FP16__)
      packed.put(
          0,
          _mm512_castph_si512(_mm512_fmadd_ph(
              _mm512_castsi512_ph(sum), _mm512_castsi512_ph(constants.a), _mm512_castsi512_ph(constants.b))));
#else
      packed.put(0, _mm512_or_si512(sum, constants.a));
#endif
    } else {
      constexpr int xor_and = 0x78;  // flip ^ (word & mask); both masks are 0x8fff
      __m512i low = _mm512_ternarylogic_epi32(constants.b, x.low, constants.a, xor_and);
      __m512i high = _mm512_ternarylogic_epi32(constants.c, x.high, constants.a, xor_and);
#if defined(__AVX512FP16__)
      packed.put(0, _mm512_castph_si512(_mm512_add_ph(_mm512_castsi512_ph(low), _mm512_castsi512_ph(high))));
#else
      packed.put(0, low);
      packed.put(1, high);
#endif
    }
  }

  StateReader reader;
  Constants<CODEBOOK> constants;
};

}  // namespace mlx_marlin::cpu::MARLIN_TIER

#if defined(__AVX512VNNI__) && !defined(__AVX512FP16__)
#include "cpu/simd/avx512_vnni.h"
#endif
#include "cpu/simd/avx512_words.h"
