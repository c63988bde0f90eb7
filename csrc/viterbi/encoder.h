// What an instruction set offers to the driver in search.cpp.
#pragma once

#include <cstdint>

namespace mlx_marlin::viterbi {

// The search for one K.
struct Encoder {
  int tiles;               // tiles searched side by side
  int64_t scratch_floats;  // 64-byte aligned scratch of one worker
  int64_t table_floats;    // 64-byte aligned
  // Puts the 65536 values in the order in which the steps read them.
  void (*arrange)(const float* values, float* table);
  // Searches count <= tiles tiles.
  void (*run)(const float* tiles, int count, const float* values, const float* table, float* scratch, uint16_t* states);
};

// Encoders for K = 1, 1.5, 2, 2.5, 3, 3.5, 4 .. 8 at position 2 * K; the others have no tiles. Those that the target's
// architecture lacks are not defined.
const Encoder* encoders_baseline();
const Encoder* encoders_avx2();
const Encoder* encoders_avx512();
const Encoder* encoders_neon();

}  // namespace mlx_marlin::viterbi
