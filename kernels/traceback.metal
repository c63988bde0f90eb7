// The encoder's search, back: the states of the cheapest path through a tile, from the minima that viterbi.metal kept.
// Between two kept steps all paths to the known state are a tree: it is evaluated from the oldest step on, with the
// arithmetic of the way forward. Of equal costs the lowest state's wins.
#include "search.h"
#include "trellis.h"

static constant constexpr const int kSteps = MARLIN_TILE_SIZE;
static constant constexpr const uint kNone = 0xffffffffu;

template <int H, int Codebook>
struct Traceback {
  static constant constexpr const int even = fresh_bits(H, 0);
  static constant constexpr const int odd = fresh_bits(H, 1);
  // From here on the branches into a node are the lanes' work.
  static constant constexpr const bool wide = 1 << even >= MARLIN_SIMD_SIZE;

  device const float* targets;  // of the tile
  device const float* history;  // of the tile
  threadgroup float* costs;     // node b of level d is at 2^added(d) + b
  threadgroup uchar* choices;   // likewise
  uint index;
  uint threads;
  uint lane;
  uint rotation;
  bool forced;
  uint seam;
  uint t;  // the last known state is that of step t
  uint state;

  static METAL_FUNC float cost(float target, uint state, float before) {
    const float error = target - float(codebook_value<Codebook>(ushort(state)));
    return fma(error, error, before);
  }

  // Bits that the last d steps up to t added.
  METAL_FUNC uint added(uint d) const thread {
    return (t + 1) * H / 2 - (t + 1 - d) * H / 2;
  }

  // State b of level d, d steps before t: its bits that t's state does not have are b.
  METAL_FUNC uint state_at(uint d, uint b) const thread {
    return ((b << (16 - added(d))) & 0xffffu) | (state >> added(d));
  }

  // G of the step before a slot's first one.
  METAL_FUNC float minimum(uint slot, uint node) const thread {
    if (slot == 0) {
      const bool begins = node == (seam & ((1u << (16 - even)) - 1));
      return forced && !begins ? kUnreachable : 0.0f;
    }
    return history[((slot - 1) << (16 - even)) + node];
  }

  // The state with the least final cost; the lowest of them.
  METAL_FUNC uint cheapest(uint last_slot) const thread {
    const float target = targets[(kSteps - 1) ^ rotation];
    device const float* before = history + (last_slot << (16 - even));
    float least = kUnreachable;
    uint found = kNone;
    for (uint s = index; s < 65536; s += threads) {
      const float c = cost(target, s, before[s >> odd]);
      found = c < least ? s : found;
      least = min(least, c);
    }
    const float of_lanes = simd_min(least);
    const uint state_of_lanes = simd_min(least == of_lanes ? found : kNone);
    const uint simdgroups = threads / MARLIN_SIMD_SIZE;
    if (lane == 0) {
      costs[index / MARLIN_SIMD_SIZE] = of_lanes;
      costs[simdgroups + index / MARLIN_SIMD_SIZE] = as_type<float>(state_of_lanes);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    least = kUnreachable;
    for (uint i = 0; i < simdgroups; ++i) {
      least = min(least, costs[i]);
    }
    found = kNone;
    for (uint i = 0; i < simdgroups; ++i) {
      found = costs[i] == least ? min(found, as_type<uint>(costs[simdgroups + i])) : found;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return found;
  }

  // The minima of level d - 1 from those of level d, the oldest of which are in the history.
  template <int Bits>
  METAL_FUNC void level(uint d, uint depth, uint slot) const thread {
    const float target = targets[(t - d) ^ rotation];
    const uint below = added(d);
    const uint here = added(d - 1);
    const bool oldest = d == depth;
    const uint entering = fresh_bits(H, int(t - d));
    const uint first = wide ? index / MARLIN_SIMD_SIZE : index;
    const uint step = wide ? threads / MARLIN_SIMD_SIZE : threads;
    for (uint b = first; b < 1u << here; b += step) {
      // Branch h into node b comes from node h << here | b, whose state is this one with h on top.
      const uint lowest = (b << (16 - below)) | (state >> below);
      float least = kUnreachable;
      uint chosen = kNone;
      MARLIN_UNROLL
      for (int i = 0; i < (wide ? (1 << Bits) / MARLIN_SIMD_SIZE : 1 << Bits); ++i) {
        const uint h = wide ? i * MARLIN_SIMD_SIZE + lane : i;
        const uint s = lowest + (h << (16 - Bits));
        const float before = oldest ? minimum(slot, s >> entering) : costs[(1u << below) + (h << here) + b];
        const float c = cost(target, s, before);
        chosen = c < least || i == 0 ? h : chosen;
        least = i == 0 ? c : min(least, c);
      }
      if constexpr (wide) {
        const float own = least;
        least = simd_min(own);
        chosen = simd_min(own == least ? chosen : kNone);
      }
      if (!wide || lane == 0) {
        costs[(1u << here) + b] = least;
        choices[(1u << here) + b] = uchar(chosen);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Moves t back to the first step of its slot, or to `stop` if that is later. States of steps in between are written
  // where there is a place for them.
  METAL_FUNC void walk(uint stride, uint stop, device ushort* states) thread {
    const uint slot = (t - 1) / stride;
    const uint depth = t - slot * stride;
    for (uint d = depth; d > 0; --d) {
      // A node of level d - 1 is entered by the bits of its own step.
      if (((t - d + 1) & 1) == 0) {
        level<even>(d, depth, slot);
      } else {
        level<odd>(d, depth, slot);
      }
    }
    uint b = 0;
    uint found = state;
    const uint most = min(depth, t - stop);
    for (uint d = 1; d <= most; ++d) {
      const uint here = added(d - 1);
      b |= uint(choices[(1u << here) + b]) << here;
      found = state_at(d, b);
      if (forced && index == 0) {
        states[t - d] = ushort(found);
      }
    }
    t -= most;
    state = found;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
};

// One threadgroup per tile.
template <int H, int Codebook>
[[kernel]] void trellis_traceback(
    constant MarlinViterbiArgs& args [[buffer(0)]],
    device const float* tiles [[buffer(1)]],
    device const float* history [[buffer(2)]],
    device ushort* states [[buffer(3)]],
    threadgroup float* costs [[threadgroup(0)]],
    uint tile [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  Traceback<H, Codebook> body;
  device ushort* path = states + tile * kSteps;
  body.targets = tiles + tile * kSteps;
  body.history = history + tile * (args.slots << (16 - fresh_bits(H, 0)));
  body.costs = costs;
  body.choices = (threadgroup uchar*)(costs + args.tree_nodes);
  body.index = index;
  body.threads = threads;
  body.lane = lane;
  body.rotation = args.rotation;
  body.forced = args.forced != 0;
  body.t = kSteps - 1;
  body.seam = body.forced ? uint(path[kSteps - 1]) : 0u;
  body.state = body.forced ? body.seam : body.cheapest(args.slots - 1);
  // Free ends: the state before position 0 is all that is wanted.
  const uint stop = body.forced ? 0 : kSteps / 2 - 1;
  while (body.t > stop) {
    body.walk(args.stride, stop, path);
  }
  if (!body.forced && index == 0) {
    path[kSteps - 1] = ushort(body.state);
  }
}
