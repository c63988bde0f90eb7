// The order of a tile and the constants of the codebooks (python: codec.py, which has the sources).
#pragma once

#include <cstdint>

#include "cpu/simd/unroll.h"
#include "format.h"

namespace mlx_marlin::cpu {

// Rows of a column in the order in which a tile stores them.
constexpr int kTileRows[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};

constexpr uint32_t kMul1Multiplier = 0x83DCD12D;
// (1024 + s) * 0x1eee + 0xc931 in halves, as s * scale + offset. All are multiples of 2^-18.
constexpr float kMul1Scale = 1774.0f / (1 << 18);
constexpr float kMul1Offset = 1024 * kMul1Scale - 10.3828125f;

template <int CODEBOOK>
constexpr uint32_t kHalvesMultiplier = CODEBOOK == MARLIN_CODEBOOK_3INST ? 89226354u : 0xCBAC1FEDu;
template <int CODEBOOK>
constexpr uint32_t kHalvesIncrement = CODEBOOK == MARLIN_CODEBOOK_3INST ? 64248484u : 0u;
constexpr uint32_t kHalvesMask = 0x8fff8fff;
constexpr uint32_t kHalvesXor = 0x3b603b60;

}  // namespace mlx_marlin::cpu
