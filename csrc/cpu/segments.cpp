#include "cpu/segments.h"

#include <algorithm>

#include "format.h"

namespace mlx_marlin::cpu {

Segments::Segments(const uint32_t* ids, int64_t slots, int experts, int segment_rows) : order(slots), segment(slots) {
  std::vector<int64_t> starts(experts + 2, 0);
  for (int64_t s = 0; s < slots; ++s) {
    ++starts[(ids ? ids[s] : 0) + 1];
  }
  for (int e = 0; e < experts; ++e) {
    starts[e + 1] += starts[e];
    for (int64_t begin = starts[e]; begin < starts[e + 1]; begin += segment_rows) {
      int rows = static_cast<int>(std::min<int64_t>(segment_rows, starts[e + 1] - begin));
      std::fill_n(segment.begin() + begin, rows, static_cast<int32_t>(list.size()));
      list.push_back({e, begin, rows});
    }
  }
  for (int64_t s = 0; s < slots; ++s) {
    order[starts[ids ? ids[s] : 0]++] = s;
  }
}

std::vector<Batch> make_batches(const std::vector<Segment>& segments, int64_t max_rows) {
  std::vector<Batch> batches;
  for (int64_t s = 0; s < static_cast<int64_t>(segments.size()); ++s) {
    if (batches.empty() || batches.back().rows + segments[s].rows > max_rows) {
      batches.push_back({s, s, segments[s].begin, 0});
    }
    batches.back().last = s + 1;
    batches.back().rows += segments[s].rows;
  }
  return batches;
}

int segment_rows(const Config& config) {
  constexpr int largest = 64, beyond = 128;
  return config.panel_rows >= largest ? beyond : std::max(1, config.panel_rows);
}

int block_columns(const Config& config, int n) {
  int blocks = std::max(1, config.task_columns / MARLIN_HADAMARD_SIZE);
  return std::min(blocks * MARLIN_HADAMARD_SIZE, n);
}

}  // namespace mlx_marlin::cpu
