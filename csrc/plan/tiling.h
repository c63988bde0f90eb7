// How a product's columns and its depth are divided among the simdgroups of a threadgroup.
#pragma once

#include <cstdint>

#include "call.h"

namespace mlx_marlin {

// Metal's limit on every Apple GPU.
inline constexpr uint32_t kMaxThreadgroupBytes = 32768;

struct Tiling {
  int rows;          // per row tile
  bool matrix;       // rows are units of 8 on simdgroup matrices or accelerators
  bool accelerator;  // neural accelerators of M5
  int column_tiles;  // 16-column tiles per threadgroup and projection
  int tiles_per_simdgroup;
  int k_splits;
  int simdgroups;
  uint32_t sums_bytes;  // threadgroup memory of the sums

  int columns() const {
    return 16 * column_tiles;
  }
  // Row count as the kernel templates take it.
  int row_parameter() const {
    return matrix ? rows / 8 : rows;
  }
  // Whole 128-blocks, so that the threadgroup can apply the Hadamard transform itself.
  bool whole_blocks() const {
    return columns() % 128 == 0;
  }
};

// Throws std::invalid_argument where the config has no tiling for `projections` products of depth k.
Tiling make_tiling(const KernelConfig& config, int projections, int k, int n);

// Bytes of `rows` rotated rows: operands, and with halves the scale of every block. Operands of the accelerators are
// halves always, two per value if not told otherwise.
uint64_t operand_bytes(uint64_t rows, int k, bool halves, bool accelerator = false);

// Whether a threadgroup makes `copies` times its rows' rotated input itself, in its own memory: from x, or from sums of
// gate and up. Only where few rows are wanted, and while three threadgroups fit in the memory of an M1's core.
bool makes_input(const KernelConfig& config, const Tiling& tiling, int copies, int k);

// makes_input for rows of x. 16 columns would spend a sixth of their time on it.
bool rotates_itself(const KernelConfig& config, const Tiling& tiling, int projections, int k);

}  // namespace mlx_marlin
