// The order of a tile (python: codec.py), and the constants of the codebooks as the decoders use them.
#pragma once

#include <cstdint>

#include "cpu/simd/unroll.h"
#include "format.h"

namespace mlx_marlin::cpu {

// Rows of a column in the order in which a tile stores them.
constexpr int kTileRows[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};

// Where a tile's windows lie in its stream (python: codec.ends). A width is given as twice the bits, an integer at half
// rates too. A group is 32 positions; two groups are a whole number of 32-bit words, one is at whole widths only.

// The stream bit behind the window of a position.
constexpr int window_end(int half_bits, int position) {
  return (position + 1) * half_bits / 2;
}

// The first byte of the words that hold the windows of a group.
constexpr int group_begin(int half_bits, int group) {
  return (half_bits * group + 1) / 2 * 4 - 4;
}

// A table of the windows of even and of odd groups, for each width: by_width[half_bits][group % 2].
template <typename Windows>
struct WindowTable {
  Windows by_width[2 * MARLIN_MAX_BITS + 1][2];

  constexpr WindowTable() {
    for (int half_bits = 2; half_bits <= 2 * MARLIN_MAX_BITS; ++half_bits) {
      for (int parity = 0; parity < 2; ++parity) {
        by_width[half_bits][parity] = Windows(half_bits, parity);
      }
    }
  }
};

// MUL1 of a byte sum s, as s * scale + offset. All are multiples of 2^-18.
constexpr float kMul1Scale = MARLIN_MUL1_SCALE;
constexpr float kMul1Offset = 1024 * MARLIN_MUL1_SCALE + MARLIN_MUL1_OFFSET;

template <int CODEBOOK>
constexpr uint32_t kHalvesMultiplier =
    CODEBOOK == MARLIN_CODEBOOK_3INST ? MARLIN_3INST_MULTIPLIER : MARLIN_MCG_MULTIPLIER;
template <int CODEBOOK>
constexpr uint32_t kHalvesIncrement = CODEBOOK == MARLIN_CODEBOOK_3INST ? MARLIN_3INST_INCREMENT : 0u;

// The bits of the half that equals x; x must be normal as a half and have no more than 11 significant bits.
MARLIN_INLINE constexpr uint16_t half_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits & 0x7fffffff) >> 13) - (112 << 10)));
}

}  // namespace mlx_marlin::cpu
