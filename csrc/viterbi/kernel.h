// The search itself, written once over a vector type V and compiled once per instruction set.
//
// A path cost c_t[s] = G_{t-1}[s >> K] + (x_t - value[s])^2, where G_t[j] is the least c_t over the
// 2^K states whose low 16 - K bits are j: the predecessors of a state differ only in their top bits.
// Only the group minima G are kept, so a step is a subtraction, a fused multiply-add and a minimum
// per state. No decisions are stored: G is kept at every `kStride`-th step, and the way back
// recomputes the few candidates in between with the same arithmetic, hence exactly.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "viterbi/encoder.h"

namespace mlx_marlin::viterbi {
namespace {

constexpr int kStates = 1 << 16;
constexpr int kSteps = 256;

// Steps between kept group minima: 2^(K * stride) candidates are recomputed per stride on the way
// back, so the stride shrinks with K; it keeps the history of a tile at 4 MB or less.
constexpr int stride_of(int bits) {
  return bits == 1 ? 8 : bits == 2 ? 4 : bits <= 4 ? 2 : 1;
}

template <class V, int K>
struct Search {
  static constexpr int kBranches = 1 << K;
  static constexpr int kGroups = kStates >> K;
  static constexpr int kHigh = kGroups >> K;  // groups that share the top bits
  static constexpr int kLanes = V::kLanes;
  // With 2^K >= lanes all lanes have one predecessor group, which is broadcast. Otherwise the lanes
  // are consecutive groups, and the results of the 2^K low parts are interleaved afterwards.
  static constexpr bool kBroadcast = kBranches >= kLanes;
  // Tiles share the load of a value. Eight accumulators per tile leave registers for half as many.
  static constexpr int kTiles = !kBroadcast && K == 3 ? V::kTiles / 2 : V::kTiles;
  static constexpr int kStride = stride_of(K);
  static constexpr int kSlots = (kSteps + kStride - 1) / kStride + 1;
  // The tiles' arrays must not fall on the same cache sets.
  static constexpr int kPitch = kGroups + 16;

  static constexpr int64_t scratch_floats() {
    return int64_t(kTiles) * kPitch * (kSlots + 2);
  }

  static void arrange(const float* values, float* table) {
    if constexpr (kBroadcast) {
      for (int j = 0; j < kGroups; j += kLanes) {
        for (int h = 0; h < kBranches; ++h, table += kLanes) {
          std::copy_n(values + h * kGroups + j, kLanes, table);
        }
      }
    } else {
      for (int q = 0; q < kHigh; q += kLanes) {
        for (int h = 0; h < kBranches; ++h) {
          for (int low = 0; low < kBranches; ++low) {
            for (int i = 0; i < kLanes; ++i) {
              *table++ = values[h * kGroups + (q + i) * kBranches + low];
            }
          }
        }
      }
    }
  }

  // One step for kTiles tiles: out = G_t from in = G_{t-1}.
  static void step(const float* table, const float* x, const float* in, float* out) {
    if constexpr (kBroadcast) {
      step_broadcast(table, x, in, out);
    } else {
      step_interleave(table, x, in, out);
    }
  }

  static void step_broadcast(const float* table, const float* x, const float* in, float* out) {
    typename V::Type target[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      target[t] = V::broadcast(x[t]);
    }
    for (int j = 0; j < kGroups; j += kLanes) {
      const float* base = in + (j >> K);
      typename V::Type best[kTiles];
      for (int t = 0; t < kTiles; ++t) {
        best[t] = V::broadcast(std::numeric_limits<float>::infinity());
      }
      for (int h = 0; h < kBranches; ++h, table += kLanes) {
        const auto value = V::load(table);
        for (int t = 0; t < kTiles; ++t) {
          const auto d = target[t] - value;
          const auto cost = V::fma(d, d, V::broadcast(base[h * kHigh + t * kPitch]));
          best[t] = V::min(best[t], cost);
        }
      }
      for (int t = 0; t < kTiles; ++t) {
        V::store(out + j + t * kPitch, best[t]);
      }
    }
  }

  static void step_interleave(const float* table, const float* x, const float* in, float* out) {
    typename V::Type target[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      target[t] = V::broadcast(x[t]);
    }
    for (int q = 0; q < kHigh; q += kLanes) {
      typename V::Type best[kTiles][kBranches];
      for (int t = 0; t < kTiles; ++t) {
        for (int low = 0; low < kBranches; ++low) {
          best[t][low] = V::broadcast(std::numeric_limits<float>::infinity());
        }
      }
#pragma GCC unroll 1
      for (int h = 0; h < kBranches; ++h) {
        typename V::Type before[kTiles];
        for (int t = 0; t < kTiles; ++t) {
          before[t] = V::load(in + t * kPitch + h * kHigh + q);
        }
#pragma GCC unroll 8
        for (int low = 0; low < kBranches; ++low, table += kLanes) {
          const auto value = V::load(table);
          for (int t = 0; t < kTiles; ++t) {
            const auto d = target[t] - value;
            best[t][low] = V::min(best[t][low], V::fma(d, d, before[t]));
          }
        }
      }
      for (int t = 0; t < kTiles; ++t) {
        interleave(best[t], out + t * kPitch + (q << K));
      }
    }
  }

  // out[i * 2^K + low] = rows[low][i].
  static void interleave(typename V::Type (&rows)[kBranches], float* out) {
    for (int level = 0; level < K; ++level) {
      typename V::Type next[kBranches];
      for (int i = 0; i < kBranches / 2; ++i) {
        V::zip(rows[i], rows[i + kBranches / 2], next[2 * i], next[2 * i + 1]);
      }
      std::copy_n(next, kBranches, rows);
    }
    for (int low = 0; low < kBranches; ++low) {
      V::store(out + low * kLanes, rows[low]);
    }
  }

  // The state at step t - 1, ..., first, given the one at step t, where `group` holds G_{first-1}:
  // a full tree of predecessors, evaluated from the oldest step on.
  static void walk_back(
      const float* values, const float* x, const float* group, int first, int t, uint32_t state, uint16_t* path) {
    constexpr int kLeaves = 1 << (K * kStride);
    std::array<float, kLeaves> cost;
    std::array<std::array<uint8_t, kLeaves>, kStride> choice;
    const int depth = t - first;
    // Node b of level d: the state d steps before t whose d fields of K bits above state >> (d * K)
    // are b; its low field is the choice made at the youngest step.
    auto state_at = [&](int d, uint32_t b) { return ((b << (16 - K * d)) & 0xffffu) | (state >> (K * d)); };
    for (uint32_t b = 0; b < 1u << (K * depth); ++b) {
      cost[b] = group[state_at(depth, b) >> K];
    }
    for (int d = depth; d >= 1; --d) {
      const float target = x[t - d];
      const uint32_t nodes = 1u << (K * (d - 1));
      for (uint32_t b = 0; b < nodes; ++b) {
        float best = std::numeric_limits<float>::infinity();
        uint8_t chosen = 0;
        for (uint32_t h = 0; h < uint32_t(kBranches); ++h) {
          const uint32_t child = (h << (K * (d - 1))) | b;
          const float e = target - values[state_at(d, child)];
          const float c = std::fma(e, e, cost[child]);
          if (c < best) {
            best = c;
            chosen = uint8_t(h);
          }
        }
        cost[b] = best;
        choice[d - 1][b] = chosen;
      }
    }
    uint32_t b = 0;
    for (int d = 1; d <= depth; ++d) {
      b |= uint32_t(choice[d - 1][b]) << (K * (d - 1));
      path[t - d] = uint16_t(state_at(d, b));
    }
  }

  // States of steps [stop, t) of one tile, given the state at step t.
  static void trace(const float* values, const float* x, const float* history, int t, int stop, uint16_t* path) {
    while (t > stop) {
      const int slot = (t - 1) / kStride;
      const float* group = history + int64_t(slot) * kTiles * kPitch;
      walk_back(values, x, group, slot * kStride, t, path[t], path);
      t = slot * kStride;
    }
  }

  // The state with the least final cost; the lowest of them.
  static uint16_t cheapest(const float* values, float x, const float* before, const float* last) {
    const float least = *std::min_element(last, last + kGroups);
    uint32_t result = kStates;
    for (int j = 0; j < kGroups; ++j) {
      if (last[j] != least) {
        continue;
      }
      for (uint32_t s = uint32_t(j); s < result; s += kGroups) {
        const float e = x - values[s];
        if (std::fma(e, e, before[s >> K]) == least) {
          result = s;
          break;
        }
      }
    }
    return uint16_t(result);
  }

  // All steps for kTiles tiles, x[t][i] being step t of tile i. History slot i holds
  // G_{i * kStride - 1}; the first is filled by the caller. Returns G_254 and G_255.
  static std::array<const float*, 2> forward(const float* table, const float* x, float* scratch) {
    constexpr int64_t kBlock = int64_t(kTiles) * kPitch;
    float* spare[2] = {scratch + kSlots * kBlock, scratch + (kSlots + 1) * kBlock};
    const float* before = nullptr;
    const float* in = scratch;
    for (int t = 0; t < kSteps; ++t) {
      const bool kept = (t + 1) % kStride == 0;
      float* out = kept ? scratch + (t + 1) / kStride * kBlock : spare[t % 2];
      step(table, x + t * kTiles, in, out);
      before = in;
      in = out;
    }
    return {before, in};
  }

  static void run(
      const float* tiles, int count, const float* values, const float* table, float* scratch, uint16_t* states) {
    float x[kTiles][kSteps];  // a missing tile repeats the last one
    alignas(64) float columns[kSteps * kTiles];
    uint16_t path[kSteps];
    uint16_t seam[kTiles] = {};
    for (int i = 0; i < kTiles; ++i) {
      const float* tile = tiles + std::min(i, count - 1) * kSteps;
      std::rotate_copy(tile, tile + kSteps / 2, tile + kSteps, x[i]);
    }
    auto transpose = [&] {
      for (int t = 0; t < kSteps; ++t) {
        for (int i = 0; i < kTiles; ++i) {
          columns[t * kTiles + i] = x[i][t];
        }
      }
    };
    transpose();
    std::fill_n(scratch, int64_t(kTiles) * kPitch, 0.0f);
    auto ends = forward(table, columns, scratch);
    for (int i = 0; i < count; ++i) {
      path[kSteps - 1] = cheapest(values, x[i][kSteps - 1], ends[0] + i * kPitch, ends[1] + i * kPitch);
      trace(values, x[i], scratch + i * kPitch, kSteps - 1, kSteps / 2 - 1, path);
      seam[i] = path[kSteps / 2 - 1];
    }
    for (int i = 0; i < kTiles; ++i) {
      std::rotate(x[i], x[i] + kSteps / 2, x[i] + kSteps);
    }
    transpose();
    std::fill_n(scratch, int64_t(kTiles) * kPitch, std::numeric_limits<float>::infinity());
    for (int i = 0; i < kTiles; ++i) {
      scratch[i * kPitch + (seam[std::min(i, count - 1)] & (kGroups - 1))] = 0.0f;
    }
    forward(table, columns, scratch);
    for (int i = 0; i < count; ++i) {
      uint16_t* result = states + i * kSteps;
      result[kSteps - 1] = seam[i];
      trace(values, x[i], scratch + i * kPitch, kSteps - 1, 0, result);
    }
  }

  static constexpr Encoder encoder() {
    return {kTiles, scratch_floats(), &arrange, &run};
  }
};

template <class V>
const Encoder* encoders() {
  static constexpr Encoder table[8] = {Search<V, 1>::encoder(), Search<V, 2>::encoder(), Search<V, 3>::encoder(),
                                       Search<V, 4>::encoder(), Search<V, 5>::encoder(), Search<V, 6>::encoder(),
                                       Search<V, 7>::encoder(), Search<V, 8>::encoder()};
  return table;
}

}  // namespace
}  // namespace mlx_marlin::viterbi
