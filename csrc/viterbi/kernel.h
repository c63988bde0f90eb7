// The search itself, written once over a vector type V and compiled once per instruction set.
//
// Position t adds D(t) bits to the stream: K, or at a half rate K - 1/2 where t is even and K + 1/2 where it is odd. A
// path cost c_t[s] = G_{t-1}[s >> D(t)] + (x_t - value[s])^2, where G_t[j] is the least c_t over the 2^D(t+1) states
// whose low 16 - D(t+1) bits are j, a node: the predecessors of a state differ only in their top bits.
// Only the nodes' minima G are kept, so a step is a subtraction, a fused multiply-add and a minimum
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

// A width is given as twice the bits per weight. The bits that position t adds to the stream.
constexpr int fresh_bits(int half_bits, int t) {
  return (t + 1) * half_bits / 2 - t * half_bits / 2;
}

// Steps between kept minima: 2^(K * stride) candidates are recomputed per stride on the way back, so the stride shrinks
// with K; it keeps the history of a tile at 4 MB or less (5.5 MB at 1.5 bits). Even at half rates, so that all that is
// kept has nodes of one size.
constexpr int stride_of(int half_bits) {
  return half_bits == 2 ? 8 : half_bits == 3 ? 6 : half_bits <= 5 ? 4 : half_bits <= 8 ? 2 : 1;
}

// A step for `Tiles` tiles, whose arrays are `Pitch` floats apart: it adds `In` bits, the next one `Out`.
template <class V, int In, int Out, int Tiles, int Pitch>
struct Step {
  static constexpr int kBranches = 1 << Out;
  static constexpr int kNodes = kStates >> Out;
  static constexpr int kHigh = kNodes >> In;  // nodes before that share the top bits
  static constexpr int kLows = 1 << In;
  static constexpr int kLanes = V::kLanes;
  // With 2^In >= lanes all lanes have one predecessor node, which is broadcast. Otherwise the lanes
  // are consecutive predecessors, and the results of the 2^In low parts are interleaved afterwards.
  static constexpr bool kBroadcast = kLows >= kLanes;

  // Puts the 65536 values in the order in which the step reads them.
  static void arrange(const float* values, float* table) {
    if constexpr (kBroadcast) {
      for (int j = 0; j < kNodes; j += kLanes) {
        for (int h = 0; h < kBranches; ++h, table += kLanes) {
          std::copy_n(values + h * kNodes + j, kLanes, table);
        }
      }
    } else {
      for (int q = 0; q < kHigh; q += kLanes) {
        for (int h = 0; h < kBranches; ++h) {
          for (int low = 0; low < kLows; ++low) {
            for (int i = 0; i < kLanes; ++i) {
              *table++ = values[h * kNodes + (q + i) * kLows + low];
            }
          }
        }
      }
    }
  }

  // out = G_t from in = G_{t-1}.
  static void run(const float* table, const float* x, const float* in, float* out) {
    if constexpr (kBroadcast) {
      broadcast(table, x, in, out);
    } else {
      interleave(table, x, in, out);
    }
  }

 private:
  static void broadcast(const float* table, const float* x, const float* in, float* out) {
    typename V::Type target[Tiles];
    for (int t = 0; t < Tiles; ++t) {
      target[t] = V::broadcast(x[t]);
    }
    for (int j = 0; j < kNodes; j += kLanes) {
      const float* base = in + (j >> In);
      typename V::Type best[Tiles];
      for (int t = 0; t < Tiles; ++t) {
        best[t] = V::broadcast(std::numeric_limits<float>::infinity());
      }
      for (int h = 0; h < kBranches; ++h, table += kLanes) {
        const auto value = V::load(table);
        for (int t = 0; t < Tiles; ++t) {
          const auto d = target[t] - value;
          const auto cost = V::fma(d, d, V::broadcast(base[h * kHigh + t * Pitch]));
          best[t] = V::min(best[t], cost);
        }
      }
      for (int t = 0; t < Tiles; ++t) {
        V::store(out + j + t * Pitch, best[t]);
      }
    }
  }

  static void interleave(const float* table, const float* x, const float* in, float* out) {
    typename V::Type target[Tiles];
    for (int t = 0; t < Tiles; ++t) {
      target[t] = V::broadcast(x[t]);
    }
    for (int q = 0; q < kHigh; q += kLanes) {
      typename V::Type best[Tiles][kLows];
      for (int t = 0; t < Tiles; ++t) {
        for (int low = 0; low < kLows; ++low) {
          best[t][low] = V::broadcast(std::numeric_limits<float>::infinity());
        }
      }
#pragma GCC unroll 1
      for (int h = 0; h < kBranches; ++h) {
        typename V::Type before[Tiles];
        for (int t = 0; t < Tiles; ++t) {
          before[t] = V::load(in + t * Pitch + h * kHigh + q);
        }
#pragma GCC unroll 8
        for (int low = 0; low < kLows; ++low, table += kLanes) {
          const auto value = V::load(table);
          for (int t = 0; t < Tiles; ++t) {
            const auto d = target[t] - value;
            best[t][low] = V::min(best[t][low], V::fma(d, d, before[t]));
          }
        }
      }
      for (int t = 0; t < Tiles; ++t) {
        zip_all(best[t], out + t * Pitch + (q << In));
      }
    }
  }

  // out[i * 2^In + low] = rows[low][i].
  static void zip_all(typename V::Type (&rows)[kLows], float* out) {
    for (int level = 0; level < In; ++level) {
      typename V::Type next[kLows];
      for (int i = 0; i < kLows / 2; ++i) {
        V::zip(rows[i], rows[i + kLows / 2], next[2 * i], next[2 * i + 1]);
      }
      std::copy_n(next, kLows, rows);
    }
    for (int low = 0; low < kLows; ++low) {
      V::store(out + low * kLanes, rows[low]);
    }
  }
};

template <class V, int HalfBits>
struct Search {
  static constexpr bool kHalfRate = HalfBits % 2 == 1;
  static constexpr int kEvenBits = fresh_bits(HalfBits, 0);
  static constexpr int kOddBits = fresh_bits(HalfBits, 1);
  // Tiles share the load of a value. Eight accumulators per tile leave registers for half as many.
  static constexpr bool kEightSums = V::kLanes > 8 && (kEvenBits == 3 || kOddBits == 3);
  static constexpr int kTiles = kEightSums ? V::kTiles / 2 : V::kTiles;
  static constexpr int kStride = stride_of(HalfBits);
  static_assert(!kHalfRate || kStride % 2 == 0);
  static constexpr int kSlots = (kSteps + kStride - 1) / kStride + 1;
  // Nodes before even steps: those of all minima that are kept.
  static constexpr int kNodes = kStates >> kEvenBits;
  // The tiles' arrays must not fall on the same cache sets.
  static constexpr int kPitch = kNodes + 16;
  using Even = Step<V, kEvenBits, kOddBits, kTiles, kPitch>;
  using Odd = Step<V, kOddBits, kEvenBits, kTiles, kPitch>;
  static constexpr int kTables = kHalfRate ? 2 : 1;

  static constexpr int64_t scratch_floats() {
    return int64_t(kTiles) * kPitch * (kSlots + 2);
  }

  static void arrange(const float* values, float* table) {
    Even::arrange(values, table);
    if constexpr (kHalfRate) {
      Odd::arrange(values, table + kStates);
    }
  }

  // The state at step t - 1, ..., first, given the one at step t, where `minima` holds G_{first-1}:
  // a full tree of predecessors, evaluated from the oldest step on.
  static void walk_back(
      const float* values, const float* x, const float* minima, int first, int t, uint32_t state, uint16_t* path) {
    constexpr int kLeaves = 1 << (HalfBits * kStride / 2);
    std::array<float, kLeaves> cost;
    std::array<std::array<uint8_t, kLeaves>, kStride> choice;
    const int depth = t - first;
    // Bits that the last d steps added, and those of the step d before t.
    auto added = [&](int d) { return (t + 1) * HalfBits / 2 - (t + 1 - d) * HalfBits / 2; };
    auto bits_at = [&](int d) { return fresh_bits(HalfBits, t - d); };
    // Node b of level d: the state d steps before t whose added(d) bits above state >> added(d)
    // are b; their low field is the choice made at the youngest step.
    auto state_at = [&](int d, uint32_t b) { return ((b << (16 - added(d))) & 0xffffu) | (state >> added(d)); };
    for (uint32_t b = 0; b < 1u << added(depth); ++b) {
      cost[b] = minima[state_at(depth, b) >> bits_at(depth)];
    }
    for (int d = depth; d >= 1; --d) {
      const float target = x[t - d];
      const uint32_t nodes = 1u << added(d - 1);
      const uint32_t branches = 1u << bits_at(d - 1);
      for (uint32_t b = 0; b < nodes; ++b) {
        float best = std::numeric_limits<float>::infinity();
        uint8_t chosen = 0;
        for (uint32_t h = 0; h < branches; ++h) {
          const uint32_t child = (h << added(d - 1)) | b;
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
      b |= uint32_t(choice[d - 1][b]) << added(d - 1);
      path[t - d] = uint16_t(state_at(d, b));
    }
  }

  // States of steps [stop, t) of one tile, given the state at step t.
  static void trace(const float* values, const float* x, const float* history, int t, int stop, uint16_t* path) {
    while (t > stop) {
      const int slot = (t - 1) / kStride;
      const float* minima = history + int64_t(slot) * kTiles * kPitch;
      walk_back(values, x, minima, slot * kStride, t, path[t], path);
      t = slot * kStride;
    }
  }

  // The state with the least final cost; the lowest of them.
  static uint16_t cheapest(const float* values, float x, const float* before, const float* last) {
    const float least = *std::min_element(last, last + kNodes);
    uint32_t result = kStates;
    for (int j = 0; j < kNodes; ++j) {
      if (last[j] != least) {
        continue;
      }
      for (uint32_t s = uint32_t(j); s < result; s += kNodes) {
        const float e = x - values[s];
        if (std::fma(e, e, before[s >> kOddBits]) == least) {
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
      if (t % 2 == 0) {
        Even::run(table, x + t * kTiles, in, out);
      } else {
        Odd::run(table + (kTables - 1) * kStates, x + t * kTiles, in, out);
      }
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
      scratch[i * kPitch + (seam[std::min(i, count - 1)] & (kNodes - 1))] = 0.0f;
    }
    forward(table, columns, scratch);
    for (int i = 0; i < count; ++i) {
      uint16_t* result = states + i * kSteps;
      result[kSteps - 1] = seam[i];
      trace(values, x[i], scratch + i * kPitch, kSteps - 1, 0, result);
    }
  }

  static constexpr Encoder encoder() {
    return {kTiles, scratch_floats(), kTables * kStates, &arrange, &run};
  }
};

template <class V>
const Encoder* encoders() {
  static constexpr std::array<Encoder, 17> table = [] {
    std::array<Encoder, 17> result{};
    result[2] = Search<V, 2>::encoder();
    result[3] = Search<V, 3>::encoder();
    result[4] = Search<V, 4>::encoder();
    result[5] = Search<V, 5>::encoder();
    result[6] = Search<V, 6>::encoder();
    result[7] = Search<V, 7>::encoder();
    result[8] = Search<V, 8>::encoder();
    result[10] = Search<V, 10>::encoder();
    result[12] = Search<V, 12>::encoder();
    result[14] = Search<V, 14>::encoder();
    result[16] = Search<V, 16>::encoder();
    return result;
  }();
  return table.data();
}

}  // namespace
}  // namespace mlx_marlin::viterbi
