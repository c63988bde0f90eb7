// Vectors of four floats in the compilers' vector extension: any CPU.
#pragma once

#include <cstring>

#include "cpu/simd/tile.h"

namespace mlx_marlin::cpu::MARLIN_TIER {

typedef float V __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));  // also sums of integers

constexpr int kLanes = 4;

MARLIN_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

MARLIN_INLINE void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

MARLIN_INLINE V set1(float x) {
  return V{x, x, x, x};
}

MARLIN_INLINE U set1_bits(uint32_t x) {
  return U{x, x, x, x};
}

MARLIN_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// min and max return b where a or b is NaN.
MARLIN_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

MARLIN_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

MARLIN_INLINE U bits(V v) {
  return (U)v;
}

MARLIN_INLINE V from_bits(U u) {
  return (V)u;
}

MARLIN_INLINE U load_u16(const uint16_t* p) {
  return U{p[0], p[1], p[2], p[3]};
}

MARLIN_INLINE void store_u16(uint16_t* p, U u) {
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<uint16_t>(u[i]);
  }
}

MARLIN_INLINE V load_half(const uint16_t* p) {
  U h = load_u16(p);
  U sign = (h & 0x8000) << 16;
  U magnitude = (h & 0x7fff) << 13;
  // 2^112 moves the exponent's bias; infinity and NaN keep an exponent of all ones.
  V scaled = from_bits(magnitude) * set1(0x1p112f);
  U special = (U)(magnitude >= set1_bits(0x7c00 << 13)) & 0x7f800000;
  return from_bits(bits(scaled) | special | sign);
}

MARLIN_INLINE void store_half(uint16_t* p, V v) {
  U sign = bits(v) & 0x80000000;
  U magnitude = bits(v) ^ sign;
  // Adding 2^(e + 13), e the exponent of the result, leaves its 10 bits, rounded to even.
  U exponent = magnitude & 0x7f800000;
  U floor = set1_bits((127 - 14) << 23);
  exponent = (U)(exponent > floor ? exponent : floor);
  V rounded = (from_bits(magnitude) + from_bits(exponent + (13 << 23))) - from_bits(exponent + (13 << 23));
  U normal = (bits(rounded) - ((127 - 15) << 23)) >> 13;
  U subnormal = __builtin_convertvector(rounded * set1(0x1p24f), U);
  U half = bits(rounded) < set1_bits((127 - 14) << 23) ? subnormal : normal;
  half = rounded >= set1(65536.0f) ? set1_bits(0x7c00) : half;
  half = magnitude > set1_bits(0x7f800000) ? set1_bits(0x7e00) : half;
  store_u16(p, half | sign >> 16);
}

MARLIN_INLINE V load_bfloat(const uint16_t* p) {
  return from_bits(load_u16(p) << 16);
}

MARLIN_INLINE void store_bfloat(uint16_t* p, V v) {
  U u = bits(v);
  U rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  U nan = u >> 16 | 0x40;
  store_u16(p, (u & 0x7fffffff) > set1_bits(0x7f800000) ? nan : rounded);
}

// Butterfly of lanes S apart: the lower lane gets a + b, the upper a - b.
template <int S>
MARLIN_INLINE V butterfly(V v) {
  if constexpr (S == 1) {
    return V{v[0], -v[1], v[2], -v[3]} + V{v[1], v[0], v[3], v[2]};
  } else {
    return V{v[0], v[1], -v[2], -v[3]} + V{v[2], v[3], v[0], v[1]};
  }
}

// v * 2^n for integral n in the normal range.
MARLIN_INLINE V scale_exponent(V v, V n) {
  return v * from_bits((U)(__builtin_convertvector(n, I) + 127) << 23);
}

// Each chain holds one column; a step is four rows.
constexpr int kSteps = 4;
constexpr int kChains = 16;
// Register block of the product from memory: rows x chains.
constexpr int kPanelBlock = 2;
constexpr int kPanelChains = 4;
// From this many rows on, a sweep is decoded into memory and multiplied from there.
constexpr int kPanelRows = 3;
// Packing and multiplying are not interleaved: nothing is packed.
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
  return set1(x[lane_column(0, chain, 0)]);
}

// One column of a tile in tile order, from natural order.
MARLIN_INLINE void store_tile_order(const V* natural, float* out) {
  for (int i = 0; i < 4; ++i) {  // rows 2i, 2i + 1, 2i + 8, 2i + 9
    V low = natural[i / 2], high = natural[i / 2 + 2];
    store(out + 4 * i, i % 2 ? V{low[2], low[3], high[2], high[3]} : V{low[0], low[1], high[0], high[1]});
  }
}

// y[0..16) = the sums of the chains, per column.
MARLIN_INLINE void sum_chains(const V* chains, float* y) {
  for (int c = 0; c < kChains; ++c) {
    V v = chains[c];
    y[lane_column(0, c, 0)] = (v[0] + v[1]) + (v[2] + v[3]);
  }
}

// y[0..16) += the sums of the steps, per row, in tile order.
MARLIN_INLINE void add_steps(const V* steps, float* y) {
  for (int s = 0; s < kSteps; ++s) {
    store(y + 4 * s, load(y + 4 * s) + steps[s]);
  }
}

// Rounds to the 11 significant bits of a half (Veltkamp). Exact for every value of every codebook: the
// tests compare all states.
MARLIN_INLINE V round_to_half(V v) {
  V c = v * set1(8193.0f);
  return c - (c - v);
}

MARLIN_INLINE I byte_sums(U state) {
  U x = state * MARLIN_MUL1_MULTIPLIER;
  x = (x & 0x00ff00ff) + (x >> 8 & 0x00ff00ff);
  return (I)((x & 0xffff) + (x >> 16));
}

template <int CODEBOOK>
MARLIN_INLINE V codebook_value(U state) {
  if constexpr (CODEBOOK == MARLIN_CODEBOOK_MUL1) {
    V sum = __builtin_convertvector(byte_sums(state), V);
    // In units of 2^-18 both terms are integers below 2^21, so that nothing is rounded but the result.
    return round_to_half(sum * set1(kMul1Scale) + set1(kMul1Offset));
  } else {
    U x = state * kHalvesMultiplier<CODEBOOK> + kHalvesIncrement<CODEBOOK>;
    x = (x & MARLIN_HALVES_MASK) ^ MARLIN_HALVES_XOR;
    auto half = [](U h) { return from_bits((h & 0x8000) << 16 | (((h & 0x7fff) << 13) + (112 << 23))); };
    return round_to_half(half(x & 0xffff) + half(x >> 16));
  }
}

// Columns `group` and `group` + 8 of a tile.
template <int CODEBOOK>
struct Packed {
  V values[8];  // [2 * step + half]
};

// Integers of 16 bits, held in 32: four rows of column `group`, and of `group` + 8.
struct W {
  I first, second;
};

template <int CODEBOOK>
struct Decoder {
  explicit Decoder(const Codes& codes) : half_bits(codes.half_bits) {}

  int bytes() const {  // of a tile
    return static_cast<int>(tile_bytes(half_bits));
  }

  // Not inlined: the callers unroll over the groups, and this is long.
  template <bool FIRST>
  __attribute__((noinline)) void pack(const uint8_t* tile, int group, Packed<CODEBOOK>& packed) const {
    for (int i = 0; i < 8; ++i) {
      packed.values[i] = codebook_value<CODEBOOK>(states(tile, 32 * group + 4 * i));
    }
  }

  // The byte sums of mul1.
  template <bool FIRST>
  __attribute__((noinline)) void words(const uint8_t* tile, int group, W* out) const {
    for (int i = 0; i < 4; ++i) {
      const int position = 32 * group + 8 * i;
      out[i] = {byte_sums(states(tile, position)), byte_sums(states(tile, position + 4))};
    }
  }

  MARLIN_INLINE void unpack(const Packed<CODEBOOK>& packed, V* out) const {
    unroll<8>([&](auto i) MARLIN_LAMBDA { out[i] = packed.values[i]; });
  }

 private:
  // Of four positions.
  U states(const uint8_t* tile, int position) const {
    const int words = bytes() / 4;
    U state;
    for (int lane = 0; lane < 4; ++lane) {
      int bit = window_end(half_bits, position + lane) - 16;
      int word = bit >> 5;
      uint32_t high, low;
      std::memcpy(&high, tile + 4 * (word < 0 ? words - 1 : word), 4);
      std::memcpy(&low, tile + 4 * (word + 1 < words ? word + 1 : 0), 4);
      uint64_t pair = static_cast<uint64_t>(high) << 32 | low;
      state[lane] = pair >> (48 - (bit & 31)) & 0xffff;
    }
    return state;
  }

  int half_bits;
};

// What tier/integer.h needs.
using WordDecoder = Decoder<MARLIN_CODEBOOK_MUL1>;

constexpr int kWords = 8;
constexpr int kCopies = 1;        // of x
constexpr int kGroupSums = 2;     // of column `group`, and of `group` + 8
constexpr int kRegisterSums = 4;  // few registers are sure, and a product of 32 bits takes several

MARLIN_INLINE void store_words(const int16_t* tile, int16_t* out) {
  std::memcpy(out, tile, MARLIN_TILE * sizeof(int16_t));
}

// Four rows, for both columns.
MARLIN_INLINE W load_words(const int16_t* x, int vector) {
  const int16_t* rows = x + 4 * vector;
  I values = {rows[0], rows[1], rows[2], rows[3]};
  return {values, values};
}

MARLIN_INLINE void add_products(W w, W x, I* sums) {
  sums[0] += w.first * x.first;
  sums[1] += w.second * x.second;
}

MARLIN_INLINE V to_floats(I sums) {
  return __builtin_convertvector(sums, V);
}

// y[0..16) = the sums of the groups, per column.
MARLIN_INLINE void sum_word_chains(const V* groups, float* y) {
  sum_chains(groups, y);
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
