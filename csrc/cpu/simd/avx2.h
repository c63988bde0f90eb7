// Vectors of eight floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "cpu/simd/byte_windows.h"
#include "cpu/simd/tile.h"

namespace mlx_marlin::cpu::MARLIN_TIER {

using V = __m256;

constexpr int kLanes = 8;

MARLIN_INLINE V load(const float* p) {
  return _mm256_loadu_ps(p);
}

MARLIN_INLINE void store(float* p, V v) {
  _mm256_storeu_ps(p, v);
}

MARLIN_INLINE V set1(float x) {
  return _mm256_set1_ps(x);
}

MARLIN_INLINE V fma(V a, V b, V c) {
  return _mm256_fmadd_ps(a, b, c);
}

// min and max return b where a or b is NaN.
MARLIN_INLINE V min(V a, V b) {
  return _mm256_min_ps(a, b);
}

MARLIN_INLINE V max(V a, V b) {
  return _mm256_max_ps(a, b);
}

MARLIN_INLINE V load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

MARLIN_INLINE void store_half(uint16_t* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

MARLIN_INLINE V load_bfloat(const uint16_t* p) {
  __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

MARLIN_INLINE void store_bfloat(uint16_t* p, V v) {
  __m256i u = _mm256_castps_si256(v);
  __m256i high = _mm256_srli_epi32(u, 16);
  __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}

// Butterfly of lanes S apart: the lower lane gets a + b, the upper a - b.
template <int S>
MARLIN_INLINE V butterfly(V v) {
  if constexpr (S == 1) {
    return _mm256_fmadd_ps(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xb1));
  } else if constexpr (S == 2) {
    return _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(v, 0x4e));
  } else {
    return _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(v, v, 0x01));
  }
}

// v * 2^n for integral n in the normal range.
MARLIN_INLINE V scale_exponent(V v, V n) {
  __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return v * _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

// A chain holds columns c and c + 8, a step four rows of both.
constexpr int kSteps = 4;
constexpr int kChains = 8;
// Register block of the product from memory: rows x chains. 12 sums, 2 weights and 1 x in 16 registers.
constexpr int kPanelBlock = 6;
constexpr int kPanelChains = 2;
// From this many rows on, a sweep is decoded into memory and multiplied from there.
constexpr int kPanelRows = 5;
// From this many rows on, packing and multiplying are interleaved: measured.
constexpr int kInterleavedRows = 1;

constexpr int lane_row(int step, int, int lane) {
  return kTileRows[4 * step + lane % 4];
}

constexpr int lane_column(int, int chain, int lane) {
  return chain + 8 * (lane / 4);
}

MARLIN_INLINE V load_step(const float* x, int step) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + 4 * step));
}

// x holds one value per column of a tile.
MARLIN_INLINE V load_column(const float* x, int chain) {
  return _mm256_set_m128(_mm_set1_ps(x[chain + 8]), _mm_set1_ps(x[chain]));
}

// One column of a tile in tile order, from natural order.
MARLIN_INLINE void store_tile_order(const V* natural, float* out) {
  __m256d a = _mm256_castps_pd(natural[0]), b = _mm256_castps_pd(natural[1]);
  __m256d even = _mm256_unpacklo_pd(a, b), odd = _mm256_unpackhi_pd(a, b);
  store(out, _mm256_castpd_ps(_mm256_permute2f128_pd(even, odd, 0x20)));
  store(out + 8, _mm256_castpd_ps(_mm256_permute2f128_pd(even, odd, 0x31)));
}

// y[0..16) = the sums of the chains, per column.
MARLIN_INLINE void sum_chains(const V* chains, float* y) {
  for (int c = 0; c < kChains; c += 4) {
    V sums = _mm256_hadd_ps(_mm256_hadd_ps(chains[c], chains[c + 1]), _mm256_hadd_ps(chains[c + 2], chains[c + 3]));
    _mm_storeu_ps(y + c, _mm256_castps256_ps128(sums));
    _mm_storeu_ps(y + c + 8, _mm256_extractf128_ps(sums, 1));
  }
}

// y[0..16) += the sums of the steps, per row, in tile order.
MARLIN_INLINE void add_steps(const V* steps, float* y) {
  for (int s = 0; s < kSteps; ++s) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(steps[s]), _mm256_extractf128_ps(steps[s], 1));
    _mm_storeu_ps(y + 4 * s, _mm_add_ps(_mm_loadu_ps(y + 4 * s), sum));
  }
}

// Rounds to the 11 significant bits of a half; scaled = v * 8193, rounded. That is where 8192 v + v loses the bits of v
// that a half does not have, and subtracting 8192 v rounds nothing. Exact for every value of every codebook: the tests
// compare all states.
MARLIN_INLINE V round_to_half(V v, V scaled) {
  return fma(v, set1(-8192.0f), scaled);
}

// 32 weights, columns `group` and `group` + 8 of a tile, on their way through the L1 cache: a conversion
// that loads needs no shuffle. What is left of each weight before its rounding: 1024 + s as a half for
// mul1, else two halves to be added.
template <int CODEBOOK>
struct alignas(32) Packed {
  static constexpr int kVectors = CODEBOOK == MARLIN_CODEBOOK_MUL1 ? 1 : 2;
  uint16_t words[kVectors][32];

  MARLIN_INLINE void put(int vector, int pair, __m256i v) {
    uint16_t* to = words[vector] + 16 * pair;
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
    asm("" : "+m"(words[vector]));  // or the optimizer would replace the loads by shuffles
  }

  MARLIN_INLINE V get(int vector, int step) const {
    return load_half(words[vector] + 8 * step);
  }
};

template <int CODEBOOK>
struct Decoder {
  static constexpr bool kMul1 = CODEBOOK == MARLIN_CODEBOOK_MUL1;
  static constexpr uint32_t kMultiplier = kMul1 ? MARLIN_MUL1_MULTIPLIER : kHalvesMultiplier<CODEBOOK>;
  static constexpr uint32_t kFlipped = CODEBOOK == MARLIN_CODEBOOK_3INST ? 0x8000 : 0;

  explicit Decoder(const Codes& codes)
      : tiles(codes), windows{kByteWindows.by_width[codes.half_bits][0], kByteWindows.by_width[codes.half_bits][1]} {}

  template <bool FIRST>
  MARLIN_INLINE void pack(const uint8_t* tile, int group, Packed<CODEBOOK>& packed) const {
    states_of<FIRST>(tile, group, [&](auto pair, __m256i states) MARLIN_LAMBDA { put(states, pair, packed); });
  }

  // The byte sums of mul1 as words: lanes of 64 bits are four rows of columns `group` and `group` + 8 in turn.
  template <bool FIRST>
  MARLIN_INLINE void words(const uint8_t* tile, int group, __m256i* out) const {
    states_of<FIRST>(
        tile, group, [&](auto pair, __m256i states) MARLIN_LAMBDA { out[pair] = byte_sums(hash(states)); });
  }

  MARLIN_INLINE void unpack(const Packed<CODEBOOK>& packed, V* out) const {
    unroll<kSteps>([&](auto s) MARLIN_LAMBDA {
      if constexpr (kMul1) {
        // 8193 v, rounded, less 8192 v: see round_to_half. Both are exact before that: all terms are short multiples of
        // 2^-18.
        constexpr float scale = kMul1Scale, offset = kMul1Offset - 1024 * kMul1Scale;
        V sum = packed.get(0, s);
        out[s] = fma(sum, set1(8193 * scale), set1(8193 * offset)) - fma(sum, set1(8192 * scale), set1(8192 * offset));
      } else {
        V v = packed.get(0, s) + packed.get(1, s);  // exact: the exponents differ by 3 at most
        out[s] = round_to_half(v, v * set1(8193.0f));
      }
    });
  }

  int bytes() const {  // of a tile
    return tiles.bytes();
  }

 private:
  // visit(pair, the states of the tile's lanes 2 * pair and 2 * pair + 1 of a group) for both pairs.
  template <bool FIRST, typename Visit>
  MARLIN_INLINE void states_of(const uint8_t* tile, int group, Visit&& visit) const {
    ByteTiles::Copy copy;
    tile = tiles.readable(tile, copy);
    const uint8_t* begin = tile + group / 2 * tiles.pair_bytes;
    const uint8_t* wrapped = tile + bytes() - 4;
    const ByteWindows& of_group = windows[group % 2];
    unroll<2>([&](auto pair) MARLIN_LAMBDA {
      __m128i low = quarter<FIRST>(begin, wrapped, of_group.offset[2 * pair]);
      __m128i high = quarter<FIRST>(begin, wrapped, of_group.offset[2 * pair + 1]);
      visit(pair, states(_mm256_set_m128i(high, low), of_group, pair));
    });
  }

  // The 16 bytes that hold the states of one of the tile's 32 lanes.
  template <bool FIRST>
  MARLIN_INLINE __m128i quarter(const uint8_t* begin, const uint8_t* wrapped, int offset) const {
    if (FIRST && offset < 0) {  // the word before the tile's first is its last
      __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(begin));
      int word;
      std::memcpy(&word, wrapped, 4);
      return _mm_insert_epi32(_mm_slli_si128(words, 4), word, 0);
    }
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(begin + offset));
  }

  // A state is 16 bits of three bytes: the upper two, shifted left, and what the third adds.
  MARLIN_INLINE __m256i states(__m256i words, const ByteWindows& of_group, int pair) const {
    auto table = [](const auto& t) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(t)); };
    __m256i upper = _mm256_shuffle_epi8(words, table(of_group.upper[pair]));
    __m256i third = _mm256_shuffle_epi8(words, table(of_group.third[pair]));
    return _mm256_or_si256(
        _mm256_mullo_epi16(upper, table(of_group.left)), _mm256_mulhi_epu16(third, table(of_group.right)));
  }

  static MARLIN_INLINE __m256i set1_word(uint32_t x) {
    return _mm256_set1_epi16(static_cast<int16_t>(x & 0xffff));
  }

  struct Product {
    __m256i low, high;  // the 16-bit halves of 16 products
  };

  static MARLIN_INLINE Product hash(__m256i state) {
    __m256i multiplier = set1_word(kMultiplier);
    return {
        _mm256_mullo_epi16(state, multiplier),
        _mm256_add_epi16(
            _mm256_mulhi_epu16(state, multiplier), _mm256_mullo_epi16(state, set1_word(kMultiplier >> 16)))};
  }

  static MARLIN_INLINE __m256i byte_sums(Product x) {
    __m256i ones = _mm256_set1_epi8(1);
    return _mm256_add_epi16(_mm256_maddubs_epi16(x.low, ones), _mm256_maddubs_epi16(x.high, ones));
  }

  static MARLIN_INLINE void put(__m256i state, int pair, Packed<CODEBOOK>& packed) {
    const Product product = hash(state);
    if constexpr (kMul1) {
      packed.put(0, pair, _mm256_or_si256(byte_sums(product), set1_word(0x6400)));
    } else {
      __m256i low = product.low, high = product.high;
      if constexpr (CODEBOOK == MARLIN_CODEBOOK_3INST) {
        // With its highest bit flipped, as comparisons have signs: flipped back with the others.
        constexpr uint32_t increment = kHalvesIncrement<CODEBOOK>;
        low = _mm256_add_epi16(low, set1_word(increment ^ kFlipped));
        __m256i carry = _mm256_cmpgt_epi16(set1_word(increment ^ kFlipped), low);  // 0 or -1
        high = _mm256_sub_epi16(_mm256_add_epi16(high, set1_word(increment >> 16)), carry);
      }
      __m256i mask = set1_word(MARLIN_HALVES_MASK);  // both masks are 0x8fff
      packed.put(0, pair, _mm256_xor_si256(_mm256_and_si256(low, mask), set1_word(MARLIN_HALVES_XOR ^ kFlipped)));
      packed.put(1, pair, _mm256_xor_si256(_mm256_and_si256(high, mask), set1_word(MARLIN_HALVES_XOR >> 16)));
    }
  }

  ByteTiles tiles;
  ByteWindows windows[2];  // of even and of odd groups
};

// What tier/integer.h needs.
using W = __m256i;  // words of 16 bits
using I = __m256i;  // sums of 32 bits
using WordDecoder = Decoder<MARLIN_CODEBOOK_MUL1>;

constexpr int kWords = 16;
constexpr int kCopies = 2;         // of x: four rows of a tile serve columns 8 apart
constexpr int kGroupSums = 1;      // of columns `group` and `group` + 8: two lanes each, twice
constexpr int kRegisterSums = 12;  // beside 2 vectors of words, 1 of x and a product in 16 registers

MARLIN_INLINE void store_words(const int16_t* tile, int16_t* out) {
  for (int i = 0; i < MARLIN_TILE; i += 4) {
    std::memcpy(out + 2 * i, tile + i, 8);
    std::memcpy(out + 2 * i + 4, tile + i, 8);
  }
}

MARLIN_INLINE W load_words(const int16_t* x, int vector) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + kWords * vector));
}

MARLIN_INLINE void add_products(W w, W x, I* sums) {
  *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(w, x));
}

MARLIN_INLINE V to_floats(I sums) {
  return _mm256_cvtepi32_ps(sums);
}

// y[0..16) = the sums of the groups, per column.
MARLIN_INLINE void sum_word_chains(const V* groups, float* y) {
  for (int g = 0; g < 8; g += 4) {
    auto columns = [&](int first) {  // g, g + 8, g + 1, g + 9
      V pair = _mm256_hadd_ps(groups[first], groups[first + 1]);
      return _mm_add_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1));
    };
    __m128 a = columns(g), b = columns(g + 2);
    _mm_storeu_ps(y + g, _mm_shuffle_ps(a, b, 0x88));
    _mm_storeu_ps(y + g + 8, _mm_shuffle_ps(a, b, 0xdd));
  }
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
