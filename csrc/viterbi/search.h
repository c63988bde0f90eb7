// The encoder's tile search: the tail-biting path through the 2^16 states of the trellis whose
// decoded values lie closest to a tile. No MLX types.
#pragma once

#include <cstdint>

namespace mlx_marlin::viterbi {

// For each tile of 256 values in storage order, the states of the path with the least squared error.
//
// Pass 1 runs on the tile rotated by 128 with free ends and gives the state before position 0;
// pass 2 forces that state at both ends (ExLlamaV3, quant/quantize_tiles_kernel.cuh). Costs are
// float32, one fused multiply-add per state; among equal costs the lowest state wins. The states are
// the same on every instruction set and with every number of threads.
//
//   tiles      [count, 256]
//   values     [65536], the value of each state
//   half_bits  2 * K
//   states     [count, 256]
//   threads    >= 1: up to that many of the pool's
void search(const float* tiles, int64_t count, const float* values, int half_bits, uint16_t* states, int threads);

}  // namespace mlx_marlin::viterbi
