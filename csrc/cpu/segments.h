// Rows grouped by expert.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace mlx_marlin::cpu {

// Slots (a row's use of one expert) order[begin .. begin + rows) use one expert.
struct Segment {
  int expert;
  int64_t begin;
  int rows;
};

struct Segments {
  std::vector<int64_t> order;    // slots sorted by expert, stable; last those whose id is the number of experts
  std::vector<int32_t> segment;  // of each position in order
  std::vector<Segment> list;

  // ids null: all slots use expert 0. At most segment_rows rows per segment.
  Segments(const uint32_t* ids, int64_t slots, int experts, int segment_rows);

  // How many slots at the beginning of `order` are in a segment.
  int64_t size() const {
    return list.empty() ? 0 : list.back().begin + list.back().rows;
  }
};

// Consecutive segments [first, last) whose rows share one scratch, slots [begin, begin + rows).
struct Batch {
  int64_t first, last;
  int64_t begin, rows;
};

// Batches of at most max_rows rows, or of one segment.
std::vector<Batch> make_batches(const std::vector<Segment>& segments, int64_t max_rows);

// Rows that share decoded tiles for a Config. 64, the largest panel_rows, stands for up to 128: the x
// of more rows (1 MB for 2048 columns) would leave the L2 cache between two tile columns.
int segment_rows(const Config& config);

// Columns per task: whole Hadamard blocks.
int block_columns(const Config& config, int n);

// Bytes of rotated activations that one batch may hold.
constexpr int64_t kBatchBytes = 32 << 20;

}  // namespace mlx_marlin::cpu
