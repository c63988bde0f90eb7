// Vectors of four floats: arm64 NEON, with native half arithmetic where the compiler's flags have it.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/byte_windows.h"
#include "cpu/simd/tile.h"

namespace mlx_marlin::cpu::MARLIN_TIER {

using V = float32x4_t;

constexpr int kLanes = 4;

MARLIN_INLINE V load(const float* p) {
  return vld1q_f32(p);
}

MARLIN_INLINE void store(float* p, V v) {
  vst1q_f32(p, v);
}

MARLIN_INLINE V set1(float x) {
  return vdupq_n_f32(x);
}

MARLIN_INLINE V fma(V a, V b, V c) {
  return vfmaq_f32(c, a, b);
}

// NaN in either argument gives NaN.
MARLIN_INLINE V min(V a, V b) {
  return vminq_f32(a, b);
}

MARLIN_INLINE V max(V a, V b) {
  return vmaxq_f32(a, b);
}

MARLIN_INLINE V load_half(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

MARLIN_INLINE void store_half(uint16_t* p, V v) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}

MARLIN_INLINE V load_bfloat(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

MARLIN_INLINE void store_bfloat(uint16_t* p, V v) {
  uint32x4_t u = vreinterpretq_u32_f32(v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
  uint32x4_t nan = vorrq_u32(u, vdupq_n_u32(0x400000));
  rounded = vbslq_u32(vceqq_f32(v, v), rounded, nan);
  vst1_u16(p, vshrn_n_u32(rounded, 16));
}

// Butterfly of lanes S apart: the lower lane gets a + b, the upper a - b.
template <int S>
MARLIN_INLINE V butterfly(V v) {
  if constexpr (S == 1) {
    return vfmaq_f32(vrev64q_f32(v), v, V{1, -1, 1, -1});
  } else {
    return vfmaq_f32(vextq_f32(v, v, 2), v, V{1, 1, -1, -1});
  }
}

// v * 2^n for integral n in the normal range.
MARLIN_INLINE V scale_exponent(V v, V n) {
  int32x4_t biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)));
}

// A chain holds one column, a step four of its rows.
constexpr int kSteps = 4;
constexpr int kChains = 16;
// Register block of the product from memory: rows x chains. 24 sums, 4 weights and 1 x in 32 registers.
constexpr int kPanelBlock = 6;
constexpr int kPanelChains = 4;
// From this many rows on, a sweep is decoded into memory and multiplied from there.
constexpr int kPanelRows = 5;
// Packing and multiplying are not interleaved: what it would bring was never measured.
constexpr int kInterleavedRows = kPanelRows;

constexpr int lane_row(int step, int, int lane) {
  return kTileRows[4 * step + lane];
}

constexpr int lane_column(int, int chain, int) {
  return chain / 2 + 8 * (chain % 2);
}

MARLIN_INLINE V load_step(const float* x, int step) {
  return load(x + 4 * step);
}

// x holds one value per column of a tile.
MARLIN_INLINE V load_column(const float* x, int chain) {
  return vld1q_dup_f32(x + lane_column(0, chain, 0));
}

// One column of a tile in tile order, from natural order.
MARLIN_INLINE void store_tile_order(const V* natural, float* out) {
  unroll<4>([&](auto i) MARLIN_LAMBDA {  // rows 2i, 2i + 1, 2i + 8, 2i + 9
    V low = natural[i / 2], high = natural[i / 2 + 2];
    store(
        out + 4 * i,
        i % 2 ? vcombine_f32(vget_high_f32(low), vget_high_f32(high))
              : vcombine_f32(vget_low_f32(low), vget_low_f32(high)));
  });
}

// y[0..16) = the sums of the chains, per column.
MARLIN_INLINE void sum_chains(const V* chains, float* y) {
  for (int c = 0; c < 16; c += 4) {
    const V* from = chains + 2 * (c % 8) + c / 8;
    store(y + c, vpaddq_f32(vpaddq_f32(from[0], from[2]), vpaddq_f32(from[4], from[6])));
  }
}

// y[0..16) += the sums of the steps, per row, in tile order.
MARLIN_INLINE void add_steps(const V* steps, float* y) {
  for (int s = 0; s < kSteps; ++s) {
    store(y + 4 * s, vaddq_f32(load(y + 4 * s), steps[s]));
  }
}

// Rounds to the 11 significant bits of a half: 8192 v + v loses the bits of v that a half does not have, and subtracting
// 8192 v rounds nothing. Exact for every value of every codebook: the tests compare all states.
MARLIN_INLINE V round_to_half(V v) {
  V scaled = vmulq_f32(v, set1(8193.0f));
  return vfmsq_f32(scaled, v, set1(8192.0f));
}

// 32 weights, columns `group` and `group` + 8 of a tile: [step][half][row].
template <int CODEBOOK>
struct Packed {
  V values[8];
};

template <int CODEBOOK>
struct Decoder {
  static constexpr bool kMul1 = CODEBOOK == MARLIN_CODEBOOK_MUL1;

  explicit Decoder(const Codes& codes)
      : tiles(codes), windows{kByteWindows.by_width[codes.half_bits][0], kByteWindows.by_width[codes.half_bits][1]} {
    for (int odd = 0; odd < 2; ++odd) {
      uint16x8_t factor = vld1q_u16(windows[0].left + 8 * odd);
      // left is 2^f: the shift counts are f and f - 8.
      left[odd] = vsubq_s16(vdupq_n_s16(15), vreinterpretq_s16_u16(vclzq_u16(factor)));
      right[odd] = vsubq_s16(left[odd], vdupq_n_s16(8));
    }
  }

  template <bool FIRST>
  MARLIN_INLINE void pack(const uint8_t* tile, int group, Packed<CODEBOOK>& packed) const {
    states_of<FIRST>(
        tile, group, [&](auto lane, uint16x8_t states) MARLIN_LAMBDA { values(states, packed.values + 2 * lane); });
  }

  // The byte sums of mul1 as words: four rows of column `group`, then of `group` + 8.
  template <bool FIRST>
  MARLIN_INLINE void words(const uint8_t* tile, int group, int16x8_t* out) const {
    states_of<FIRST>(tile, group, [&](auto lane, uint16x8_t states) MARLIN_LAMBDA {
      out[lane] = vreinterpretq_s16_u16(byte_sums(hash(states)));
    });
  }

  MARLIN_INLINE void unpack(const Packed<CODEBOOK>& packed, V* out) const {
    unroll<8>([&](auto i) MARLIN_LAMBDA { out[i] = packed.values[i]; });
  }

  int bytes() const {  // of a tile
    return tiles.bytes();
  }

 private:
  // visit(lane, its states) for each of the tile's lanes of a group.
  template <bool FIRST, typename Visit>
  MARLIN_INLINE void states_of(const uint8_t* tile, int group, Visit&& visit) const {
    ByteTiles::Copy copy;
    tile = tiles.readable(tile, copy);
    const uint8_t* begin = tile + group / 2 * tiles.pair_bytes;
    const uint8_t* wrapped = tile + bytes() - 4;
    const ByteWindows& of_group = windows[group % 2];
    unroll<4>([&](auto lane) MARLIN_LAMBDA {
      visit(lane, states(quarter<FIRST>(begin, wrapped, of_group.offset[lane]), of_group, lane));
    });
  }

  // The 16 bytes that hold the states of one of the tile's 32 lanes.
  template <bool FIRST>
  MARLIN_INLINE uint8x16_t quarter(const uint8_t* begin, const uint8_t* wrapped, int offset) const {
    if (FIRST && offset < 0) {  // the word before the tile's first is its last
      uint8x16_t before = vreinterpretq_u8_u32(vld1q_dup_u32(reinterpret_cast<const uint32_t*>(wrapped)));
      return vextq_u8(before, vld1q_u8(begin), 12);
    }
    return vld1q_u8(begin + offset);
  }

  // A state is 16 bits of three bytes: the upper two, shifted left, and what the third adds.
  MARLIN_INLINE uint16x8_t states(uint8x16_t words, const ByteWindows& of_group, int lane) const {
    auto pick = [&](const uint8_t (&table)[2][32]) {
      return vreinterpretq_u16_u8(vqtbl1q_u8(words, vld1q_u8(table[lane / 2] + 16 * (lane % 2))));
    };
    return vorrq_u16(vshlq_u16(pick(of_group.upper), left[lane % 2]), vshlq_u16(pick(of_group.third), right[lane % 2]));
  }

  // The products' 32 bits of four states each.
  struct Products {
    uint32x4_t first, second;
  };

  static MARLIN_INLINE Products hash(uint16x8_t state) {
    constexpr uint32_t multiplier = kMul1 ? MARLIN_MUL1_MULTIPLIER : kHalvesMultiplier<CODEBOOK>;
    constexpr uint32_t increment = kMul1 ? 0 : kHalvesIncrement<CODEBOOK>;
    uint32x4_t factor = vdupq_n_u32(multiplier), start = vdupq_n_u32(increment);
    return {
        vmlaq_u32(start, vmovl_u16(vget_low_u16(state)), factor),
        vmlaq_u32(start, vmovl_u16(vget_high_u16(state)), factor)};
  }

  static MARLIN_INLINE uint16x8_t byte_sums(Products x) {
    return vpaddq_u16(vpaddlq_u8(vreinterpretq_u8_u32(x.first)), vpaddlq_u8(vreinterpretq_u8_u32(x.second)));
  }

  static MARLIN_INLINE void values(uint16x8_t state, V* out) {
    Products x = hash(state);
    if constexpr (kMul1) {
      uint16x8_t sum = byte_sums(x);
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
      float16x8_t s = vreinterpretq_f16_u16(vorrq_u16(sum, vdupq_n_u16(0x6400)));  // 1024 + sum
      float16x8_t value = vfmaq_f16(
          vreinterpretq_f16_u16(vdupq_n_u16(half_bits(MARLIN_MUL1_OFFSET))), s,
          vreinterpretq_f16_u16(vdupq_n_u16(half_bits(MARLIN_MUL1_SCALE))));
      out[0] = vcvt_f32_f16(vget_low_f16(value));
      out[1] = vcvt_high_f32_f16(value);
#else
      auto value = [](uint16x4_t s) {  // exact before the rounding: short multiples of 2^-18
        V v = vcvtq_f32_u32(vmovl_u16(s));
        return round_to_half(vfmaq_f32(set1(kMul1Offset), v, set1(kMul1Scale)));
      };
      out[0] = value(vget_low_u16(sum));
      out[1] = value(vget_high_u16(sum));
#endif
    } else {
      auto mix = [](uint32x4_t v) {
        return vreinterpretq_u16_u32(
            veorq_u32(vandq_u32(v, vdupq_n_u32(MARLIN_HALVES_MASK)), vdupq_n_u32(MARLIN_HALVES_XOR)));
      };
      uint16x8_t first = mix(x.first), second = mix(x.second);
      float16x8_t low = vreinterpretq_f16_u16(vuzp1q_u16(first, second));
      float16x8_t high = vreinterpretq_f16_u16(vuzp2q_u16(first, second));
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
      float16x8_t value = vaddq_f16(low, high);
      out[0] = vcvt_f32_f16(vget_low_f16(value));
      out[1] = vcvt_high_f32_f16(value);
#else
      out[0] = round_to_half(vaddq_f32(vcvt_f32_f16(vget_low_f16(low)), vcvt_f32_f16(vget_low_f16(high))));
      out[1] = round_to_half(vaddq_f32(vcvt_high_f32_f16(low), vcvt_high_f32_f16(high)));
#endif
    }
  }

  ByteTiles tiles;
  ByteWindows windows[2];       // of even and of odd groups, which differ in whole bytes
  int16x8_t left[2], right[2];  // of even and of odd lanes
};

// What tier/integer.h needs.
using W = int16x8_t;
using I = int32x4_t;
using WordDecoder = Decoder<MARLIN_CODEBOOK_MUL1>;

constexpr int kWords = 8;
constexpr int kCopies = 1;         // of x
constexpr int kGroupSums = 2;      // of column `group`, and of `group` + 8
constexpr int kRegisterSums = 24;  // beside 2 vectors of words and 1 of x in 32 registers

MARLIN_INLINE void store_words(const int16_t* tile, int16_t* out) {
  std::memcpy(out, tile, MARLIN_TILE * sizeof(int16_t));
}

// Four rows, for both columns.
MARLIN_INLINE W load_words(const int16_t* x, int vector) {
  return vreinterpretq_s16_s64(vld1q_dup_s64(reinterpret_cast<const int64_t*>(x + 4 * vector)));
}

MARLIN_INLINE void add_products(W w, W x, I* sums) {
  sums[0] = vmlal_s16(sums[0], vget_low_s16(w), vget_low_s16(x));
  sums[1] = vmlal_high_s16(sums[1], w, x);
}

MARLIN_INLINE V to_floats(I sums) {
  return vcvtq_f32_s32(sums);
}

// y[0..16) = the sums of the groups, per column.
MARLIN_INLINE void sum_word_chains(const V* groups, float* y) {
  sum_chains(groups, y);
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
