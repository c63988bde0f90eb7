#include "plan/tiling.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "format.h"

namespace mlx_marlin {

namespace {

[[noreturn]] void refuse(const std::string& reason) {
  throw std::invalid_argument("[plan] " + reason + "; mlx_marlin.kernels.feasible tells what is legal.");
}

// Rows that no simdgroup matrices have: two or three units of 16.
bool runs_on_accelerator(Variant variant, int rows) {
  return (variant == Variant::base && rows == 32) || (variant == Variant::large_batch && rows == 48);
}

bool legal_rows(Variant variant, int rows) {
  switch (variant) {
    case Variant::decode:
      return rows >= 1 && rows <= 3;
    case Variant::prefill4:
      return rows == 4;
    case Variant::base:
      return rows == 8 || rows == 16 || runs_on_accelerator(variant, rows);
    default:
      return rows == 64 || runs_on_accelerator(variant, rows);
  }
}

bool legal_columns(Variant variant, int columns) {
  if (variant == Variant::large_batch) {
    return columns == 128;
  }
  constexpr int legal[] = {16, 32, 48, 64, 96, 128, 160, 256};
  return std::find(std::begin(legal), std::end(legal), columns) != std::end(legal);
}

// The most adjacent tiles that share one load of x and leave the sums, 2 per row and tile, in registers: an M1 has 96
// for each of 512 threads, and 128 for each of 256.
int shared_tiles(int rows, int column_tiles, int simdgroups) {
  const int most_sums = simdgroups <= 8 ? 24 : 16;
  int tiles = 4;
  while (column_tiles % tiles != 0 || 2 * rows * tiles > most_sums) {
    tiles /= 2;
  }
  return tiles;
}

// A simdgroup keeps its sums until the end, so every tile needs a home: 4 sums per lane, tile and 8 rows. At most 32
// beside as many values of x; at most 64 beside the few values that the accelerators take at a time, two tiles at once.
int matrix_tiles(int units, int column_tiles, int projections, int simdgroups, bool accelerator) {
  for (int tiles = accelerator ? 2 : 1; tiles <= 4 && tiles * units <= (accelerator ? 16 : 8); tiles *= 2) {
    if (column_tiles % tiles == 0 && projections * column_tiles / tiles <= simdgroups) {
      return tiles;
    }
  }
  refuse(
      std::to_string(simdgroups) + " simdgroups cannot hold the sums of " + std::to_string(units * 8) + " rows and " +
      std::to_string(projections * column_tiles * 16) + " columns");
}

}  // namespace

Tiling make_tiling(const KernelConfig& config, int projections, int k, int n) {
  if (!legal_rows(config.variant, config.tile_size_m)) {
    refuse("the variant has no tile of " + std::to_string(config.tile_size_m) + " rows");
  }
  if (!legal_columns(config.variant, config.tile_size_n) || config.tile_size_n > n) {
    refuse("the variant has no tile of " + std::to_string(config.tile_size_n) + " columns for " + std::to_string(n));
  }
  if (config.simdgroups < 4 || config.simdgroups > 16 || config.simdgroups % 4 != 0) {
    refuse("simdgroups must be 4, 8, 12 or 16, got " + std::to_string(config.simdgroups));
  }
  Tiling t{};
  t.rows = config.tile_size_m;
  t.matrix = config.variant == Variant::base || config.variant == Variant::large_batch;
  t.column_tiles = config.tile_size_n / 16;
  t.simdgroups = config.simdgroups;
  t.accelerator = runs_on_accelerator(config.variant, t.rows);
  t.tiles_per_simdgroup = t.matrix ? matrix_tiles(t.rows / 8, t.column_tiles, projections, t.simdgroups, t.accelerator)
                                   : shared_tiles(t.rows, t.column_tiles, t.simdgroups);
  const int groups = projections * t.column_tiles / t.tiles_per_simdgroup;
  t.k_splits = std::clamp(t.simdgroups / groups, 1, k / 16);
  const int slice_rows = t.matrix ? 8 : t.rows;
  t.sums_bytes = static_cast<uint32_t>(groups * t.k_splits * t.tiles_per_simdgroup * 16 * slice_rows) * 4;
  if (t.sums_bytes > kMaxThreadgroupBytes) {
    refuse("the sums need " + std::to_string(t.sums_bytes) + " bytes of threadgroup memory");
  }
  return t;
}

uint64_t operand_bytes(uint64_t rows, int k, bool halves, bool accelerator) {
  const uint64_t scales = halves || accelerator ? 4ull * (k / MARLIN_HADAMARD_SIZE) : 0;
  return rows * ((halves ? 2ull : 4ull) * k + scales);
}

bool makes_input(const KernelConfig& config, const Tiling& tiling, int copies, int k) {
  constexpr uint64_t most = 20 * 1024;  // of 60 KB
  const uint64_t rows = static_cast<uint64_t>(copies) * tiling.rows;
  return config.variant == Variant::decode && tiling.sums_bytes + operand_bytes(rows, k, !config.use_fp32_acc) <= most;
}

bool rotates_itself(const KernelConfig& config, const Tiling& tiling, int projections, int k) {
  return config.tile_size_n > 16 && makes_input(config, tiling, projections, k);
}

}  // namespace mlx_marlin
