// mul1 with VNNI: the byte sum of a 32-bit product is one instruction. Included by avx512.h.
//
// A vector holds 16 states of one column in 32-bit lanes, which costs twice the multiplications of the other decoders
// but no conversion: the sums come out as floats. For processors whose 32-bit multiplication is as fast as others, and
// that have no arithmetic on halves: Zen 4 and 5, Ice Lake.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

// How 16 states of column `group` and as many of column `group` + 8 are cut out of the words from the group's first on:
// the former into the low, the latter into the high half of each 32-bit lane.
struct alignas(64) PairedWindows {
  // Each 64-bit lane takes the 8 bytes that hold its 4 states, in the order of the stream (6 positions, at most 63
  // bits); `shift` picks each state's two bytes out of them.
  uint8_t gather[64] = {};
  uint8_t shift[64] = {};

  constexpr PairedWindows() = default;

  // Of even groups or, with parity 1, of odd ones.
  constexpr PairedWindows(int half_bits, int parity) {
    auto end_of = [&](int position) {
      return window_end(half_bits, 32 * parity + position) - 8 * group_begin(half_bits, parity);
    };
    for (int pair = 0; pair < 8; ++pair) {
      const int row = 2 * pair;  // of 16, in tile order
      const int position = 8 * (row / 4) + row % 4;
      const int first_byte = (end_of(position) - 16) / 8;
      for (int state = 0; state < 4; ++state) {
        const int low = 64 - (end_of(position + state / 2 + 4 * (state % 2)) - 8 * first_byte);
        shift[8 * pair + 2 * state] = static_cast<uint8_t>(low);
        shift[8 * pair + 2 * state + 1] = static_cast<uint8_t>(low + 8);
      }
      for (int byte = 0; byte < 8; ++byte) {
        gather[8 * pair + byte] = static_cast<uint8_t>((first_byte + 7 - byte) ^ 3);
      }
    }
  }
};

inline constexpr WindowTable<PairedWindows> kPairedWindows;

// 2^23 + byte sum, as floats, of 32 weights: columns `group` and `group` + 8.
template <>
struct alignas(64) Packed<MARLIN_CODEBOOK_MUL1> {
  float sums[2][16];
};

template <>
struct Decoder<MARLIN_CODEBOOK_MUL1> {
  explicit Decoder(const Codes& codes) : reader(codes) {
    const PairedWindows(&windows)[2] = kPairedWindows.by_width[codes.half_bits];
    gather[0] = _mm512_load_si512(windows[0].gather);
    gather[1] = _mm512_load_si512(windows[1].gather);
    shift = _mm512_load_si512(windows[0].shift);  // even and odd groups differ in whole bytes only
    // Hidden from the optimizer, which would else rebuild them in the loop.
    asm("" : "+v"(multiplier), "+v"(ones), "+v"(zero_sum), "+v"(low_half));
  }

  template <bool FIRST>
  MARLIN_INLINE void pack(const uint8_t* tile, int group, Packed<MARLIN_CODEBOOK_MUL1>& packed) const {
    const __m512i words = reader.template words<FIRST>(tile, group);
    const __m512i states = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(gather[group % 2], words));
    put(_mm512_and_si512(states, low_half), packed.sums[0]);
    put(_mm512_srli_epi32(states, 16), packed.sums[1]);
  }

  MARLIN_INLINE void unpack(const Packed<MARLIN_CODEBOOK_MUL1>& packed, V* out) const {
    constexpr float scale = kMul1Scale, offset = kMul1Offset - (1 << 23) * kMul1Scale;
    unroll<2>([&](auto half) MARLIN_LAMBDA {
      // Exact before the rounding: 22 bits hold the offset, 20 the value.
      const V v = fma(_mm512_load_ps(packed.sums[half]), set1(scale), set1(offset));
      out[half] = round_to_half(v, v * set1(8193.0f));
    });
  }

  int bytes() const {  // of a tile
    return reader.bytes();
  }

 private:
  MARLIN_INLINE void put(__m512i state, float* sums) const {
    const __m512i product = _mm512_mullo_epi32(state, multiplier);
    _mm512_store_si512(sums, _mm512_dpbusd_epi32(zero_sum, product, ones));
  }

  GroupReader reader;
  __m512i gather[2], shift;
  __m512i multiplier = _mm512_set1_epi32(static_cast<int>(MARLIN_MUL1_MULTIPLIER));
  __m512i ones = _mm512_set1_epi8(1);
  __m512i zero_sum = _mm512_set1_epi32(0x4b000000);  // the bits of 2^23, to which an integer adds itself
  __m512i low_half = _mm512_set1_epi32(0xffff);
};

}  // namespace mlx_marlin::cpu::MARLIN_TIER
