// How the 8 states of one of a tile's 32 lanes are cut out of 16 bytes, for sets that shuffle bytes
// within 128 bits (AVX2, NEON).
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/tile.h"
#include "cpu/tier.h"

namespace mlx_marlin::cpu {

struct alignas(32) ByteWindows {
  // For the lanes 2 * pair and 2 * pair + 1 of a group, 16 bytes each: for each state the two bytes that
  // it begins in, as a word, and the byte after them. 0x80 and above give zero.
  uint8_t upper[2][32] = {};
  uint8_t third[2][32] = {};
  // state = upper * left + (third * right >> 16): shifts of f and of f - 8 bits.
  uint16_t left[16] = {};
  uint16_t right[16] = {};
  // Of the lane's 16 bytes from the first byte of the pair of groups: whole words.
  int32_t offset[4] = {};

  constexpr ByteWindows() = default;

  // Of even groups or, with parity 1, of odd ones.
  constexpr ByteWindows(int half_bits, int parity) {
    for (int lane = 0; lane < 4; ++lane) {
      const int position = 32 * parity + 8 * lane;
      offset[lane] = (window_end(half_bits, position) + 16) / 32 * 4 - 4;
      for (int q = 0; q < 8; ++q) {
        int bit = window_end(half_bits, position + q) - 16 - 8 * offset[lane];
        int at = 16 * (lane % 2) + 2 * q;
        auto memory = [&](int byte) { return static_cast<uint8_t>(byte ^ 3); };
        upper[lane / 2][at] = memory(bit / 8 + 1);
        upper[lane / 2][at + 1] = memory(bit / 8);
        third[lane / 2][at] = memory(bit / 8 + 2);
        third[lane / 2][at + 1] = 0x80;
        left[8 * (lane % 2) + q] = static_cast<uint16_t>(1 << bit % 8);
        right[8 * (lane % 2) + q] = static_cast<uint16_t>(1 << (bit % 8 + 8));
      }
    }
  }
};

inline constexpr WindowTable<ByteWindows> kByteWindows;

// The tiles of a weight as these sets read them: loads reach up to 12 bytes beyond a tile, so that the last is read from
// a copy.
struct ByteTiles {
  struct alignas(32) Copy {
    uint8_t bytes[MARLIN_TILE_WORDS(MARLIN_MAX_BITS) * 4 + 16];
  };

  MARLIN_INLINE explicit ByteTiles(const Codes& codes)
      : pair_bytes(4 * codes.half_bits),
        last(
            codes.tiles +
            (static_cast<int64_t>(codes.k) / MARLIN_TILE * (codes.n / MARLIN_TILE) - 1) * tile_bytes(codes.half_bits)) {
  }

  MARLIN_INLINE int bytes() const {  // of a tile
    return 4 * pair_bytes;
  }

  // A tile, or `copy` of it.
  MARLIN_INLINE const uint8_t* readable(const uint8_t* tile, Copy& copy) const {
    if (__builtin_expect(tile == last, 0)) {
      std::memcpy(copy.bytes, tile, bytes());
      return copy.bytes;
    }
    return tile;
  }

  int pair_bytes;  // of two groups
  const uint8_t* last;
};

}  // namespace mlx_marlin::cpu
