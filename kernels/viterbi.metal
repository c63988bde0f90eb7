// The encoder's search, forward: for every position t and node j of a tile's trellis the least cost G_t[j] of a path,
// G_t[j] = min over h of G_{t-1}[s >> D(t)] + (x_t - value[s])^2, where s = h << (16 - D(t+1)) | j and D(t) is the number
// of bits that t adds. Equal to the CPU's to the bit: see csrc/viterbi/kernel.h. No decision is stored: minima of some
// steps are kept for traceback.metal.
//
// One threadgroup per tile. A thread has the same 128 states at every step, so that their values stay in registers as
// halves: s = high | thread | low, where the threads' 9 bits lie in the middle. It reads the nodes s >> D(t), which
// several of its states share, and writes the nodes that its states' minima are for; nodes go through threadgroup
// memory from those that write to those that read. Where more bits lead into a node than a thread has at the top, lanes
// share the rest.
#include "search.h"

static constant constexpr const int kThreadBits = 9;
static constant constexpr const int kThreads = 1 << kThreadBits;
static_assert(kThreads == MARLIN_MAX_THREADS, "the plan launches as many");
static constant constexpr const int kThreadStates = 65536 / kThreads;
static constant constexpr const int kPassBits = 13;  // nodes that fit into threadgroup memory
static constant constexpr const int kSteps = MARLIN_TILE_SIZE;

// How the states are shared out among the threads.
template <int H>
struct Shares {
  static constant constexpr const int even = fresh_bits(H, 0);
  static constant constexpr const int odd = fresh_bits(H, 1);
  // All states that differ in them have one node before them; with more than 3 a thread would have few at the top.
  static constant constexpr const int low = odd < 3 ? odd : 3;
  static constant constexpr const int high = 16 - kThreadBits - low;
  static constant constexpr const int lows = 1 << low;
  // Bits into a node that are not the thread's own but those of its place among 2^lanes neighbours.
  static constant constexpr const int lanes = odd > high ? odd - high : 0;
  static constant constexpr const int halvings = lanes < low ? lanes : low;
  // High parts of the states whose values stay in registers. Where nodes do not fit into threadgroup memory at once they
  // take 64 of a thread's registers, of which an M1 has 104 for each of 512 threads, or 32: 20 or 48 are left for values.
  static constant constexpr const int held = (H <= 3 ? 40 : H <= 5 ? 96 : kThreadStates) >> low;
};

// A step that adds In bits, before one that adds Out.
template <int H, int In, int Out>
struct Step {
  static constant constexpr const int split = Shares<H>::low > In ? Shares<H>::low - In : 0;
  static constant constexpr const int inputs = 1 << (Shares<H>::high + split);
  static constant constexpr const int own = Out < Shares<H>::high ? Out : Shares<H>::high;  // bits into a node
  static constant constexpr const int blocks = 1 << (Shares<H>::high - own);
  static constant constexpr const int outputs = blocks << (Shares<H>::low - Shares<H>::halvings);
  static constant constexpr const int node_bits = 16 - Out;
  static constant constexpr const int pass_bits = node_bits < kPassBits ? node_bits : kPassBits;
  static constant constexpr const int passes = 1 << (node_bits - pass_bits);
};

template <int Count>
struct Costs {
  float of[Count];
};

// Values of states that differ in their low bits.
template <int Count>
struct Values {
  half of[Count];
};

template <int H>
struct Forward {
  device const float* targets;  // of the tile
  device const half* table;     // values of all states
  device float* history;        // of the tile
  threadgroup float* nodes;
  uint index;   // of the thread
  uint middle;  // the threads' bits of its states
  Values<Shares<H>::lows> held[Shares<H>::held];

  // Where a node lies in threadgroup memory. Threads write eight nodes at a time, as two vectors: half of the threads
  // exchange the two, so that neither those who write nor those who read, one node each, meet in a bank.
  static METAL_FUNC uint place(uint node) {
    return Shares<H>::low == 3 && Shares<H>::lanes == 0 ? node ^ ((node >> 3) & 4) : node;
  }

  METAL_FUNC uint state(uint high, uint low) const thread {
    return (high << (kThreadBits + Shares<H>::low)) + (middle << Shares<H>::low) + low;
  }

  METAL_FUNC Values<Shares<H>::lows> load_values(uint high) const thread {
    Values<Shares<H>::lows> values;
    if constexpr (Shares<H>::lows == 2) {
      const half2 pair = ((device const half2*)table)[state(high, 0) / 2];
      values.of[0] = pair.x;
      values.of[1] = pair.y;
    } else {
      MARLIN_UNROLL
      for (int i = 0; i < Shares<H>::lows; i += 4) {
        const half4 four = ((device const half4*)table)[state(high, i) / 4];
        values.of[i] = four.x;
        values.of[i + 1] = four.y;
        values.of[i + 2] = four.z;
        values.of[i + 3] = four.w;
      }
    }
    return values;
  }

  METAL_FUNC void hold_values() thread {
    MARLIN_UNROLL
    for (int high = 0; high < Shares<H>::held; ++high) {
      held[high] = load_values(high);
    }
  }

  // The thread's part of the nodes that it reads before a step that adds In bits.
  template <int In>
  METAL_FUNC uint first_input() const thread {
    return (middle << Shares<H>::low) >> In;
  }

  // The minima over lanes that differ in `Level` bits so far: each pair of lanes shares out its nodes.
  template <int Level>
  METAL_FUNC void share(thread float (&best)[Shares<H>::lows]) const thread {
    if constexpr (Level < Shares<H>::lanes) {
      const bool upper = (index >> Level & 1) != 0;
      if constexpr (Level < Shares<H>::halvings) {
        MARLIN_UNROLL
        for (int i = 0; i < Shares<H>::lows >> (Level + 1); ++i) {
          const float kept = upper ? best[2 * i + 1] : best[2 * i];
          const float given = upper ? best[2 * i] : best[2 * i + 1];
          best[i] = min(kept, from_lane<Level>(given));
        }
      } else {
        best[0] = min(best[0], from_lane<Level>(best[0]));
      }
      share<Level + 1>(best);
    }
  }

  template <int Level>
  static METAL_FUNC float from_lane(float x) {
    if constexpr (Level < 2) {
      return quad_shuffle_xor(x, ushort(1 << Level));
    } else {
      return simd_shuffle_xor(x, ushort(1 << Level));
    }
  }

  // One step from the costs before it to those after it.
  template <int In, int Out>
  METAL_FUNC void minima(
      float target,
      const thread Costs<Step<H, In, Out>::inputs>& in,
      thread Costs<Step<H, In, Out>::outputs>& out) const thread {
    using S = Step<H, In, Out>;
    constexpr int lows = Shares<H>::lows;
    MARLIN_UNROLL
    for (int block = 0; block < S::blocks; ++block) {
      float best[lows];
      MARLIN_UNROLL
      for (int h = 0; h < 1 << S::own; ++h) {
        const int high = h * S::blocks + block;
        Values<lows> values;
        if (high < Shares<H>::held) {
          values = held[high];
        } else {
          values = load_values(high);
        }
        MARLIN_UNROLL
        for (int low = 0; low < lows; ++low) {
          const float error = target - float(values.of[low]);
          const float cost = fma(error, error, in.of[(high << S::split) | (low >> (Shares<H>::low - S::split))]);
          best[low] = h == 0 ? cost : min(best[low], cost);
        }
      }
      share<0>(best);
      MARLIN_UNROLL
      for (int i = 0; i < S::outputs / S::blocks; ++i) {
        out.of[block * (S::outputs / S::blocks) + i] = best[i];
      }
    }
  }

  // Gives the costs after a step to the threads that read them in the next one, and to the history where there is a
  // place for them.
  template <int In, int Out>
  METAL_FUNC void exchange(
      const thread Costs<Step<H, In, Out>::outputs>& out,
      thread Costs<Step<H, Out, In>::inputs>& in,
      bool keep,
      uint kept_at) const thread {
    using S = Step<H, In, Out>;
    using Next = Step<H, Out, In>;
    constexpr uint mask = (1u << S::pass_bits) - 1;
    MARLIN_UNROLL
    for (int pass = 0; pass < S::passes; ++pass) {
      write_outputs<S>(out, pass);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (keep) {
        keep_nodes<S>(kept_at + pass * (mask + 1));
      }
      read_inputs<Next, Out>(in, pass, S::passes);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  template <typename S>
  METAL_FUNC void keep_nodes(uint at) const thread {
    constexpr int rows = S::pass_bits > kThreadBits ? 1 << (S::pass_bits - kThreadBits) : 1;
    if (S::pass_bits < kThreadBits && index >= 1u << S::pass_bits) {
      return;
    }
    const uint from = place(index);
    MARLIN_UNROLL
    for (int row = 0; row < rows; ++row) {
      history[at + index + row * kThreads] = nodes[from + row * kThreads];
    }
  }

  // The nodes of a pass after step S; a pass has the same highest bits in all.
  template <typename S>
  METAL_FUNC void write_outputs(const thread Costs<S::outputs>& out, int pass) const thread {
    constexpr int lows = Shares<H>::lows;
    constexpr int halvings = Shares<H>::halvings;
    if constexpr (Shares<H>::lanes > 0) {
      const uint first = ((index >> Shares<H>::lanes) << Shares<H>::low) + (index & ((1u << halvings) - 1));
      if (Shares<H>::lanes == halvings || (index >> halvings & 1) == 0) {
        MARLIN_UNROLL
        for (int i = 0; i < S::outputs; ++i) {
          nodes[first + (i << halvings)] = out.of[i];
        }
      }
    } else {
      constexpr int blocks = S::blocks / S::passes;
      const uint first = place(index << Shares<H>::low);
      MARLIN_UNROLL
      for (int block = 0; block < blocks; ++block) {
        threadgroup float* to = nodes + (block << (kThreadBits + Shares<H>::low));
        const int i = (pass * blocks + block) * lows;
        if constexpr (lows == 2) {
          *(threadgroup float2*)(to + first) = float2(out.of[i], out.of[i + 1]);
        } else {
          MARLIN_UNROLL
          for (int four = 0; four < lows; four += 4) {
            const int j = i + four;
            *(threadgroup float4*)(to + (first ^ four)) =
                float4(out.of[j], out.of[j + 1], out.of[j + 2], out.of[j + 3]);
          }
        }
      }
    }
  }

  template <typename S, int In>
  METAL_FUNC void read_inputs(thread Costs<S::inputs>& in, int pass, int passes) const thread {
    const uint first = place(first_input<In>());
    const int highs = (S::inputs >> S::split) / passes;
    MARLIN_UNROLL
    for (int high = 0; high < highs; ++high) {
      threadgroup const float* from = nodes + (high << (kThreadBits + Shares<H>::low - In));
      const int i = (pass * highs + high) << S::split;
      if constexpr (S::split == 1) {
        const float2 two = *(threadgroup const float2*)(from + first);
        in.of[i] = two.x;
        in.of[i + 1] = two.y;
      } else {
        in.of[i] = from[first];
      }
    }
  }

  template <int In, int Out>
  METAL_FUNC void advance(
      uint t,
      constant MarlinViterbiArgs& args,
      const thread Costs<Step<H, In, Out>::inputs>& in,
      thread Costs<Step<H, Out, In>::inputs>& next,
      thread float& target,
      thread uint& until_kept,
      thread uint& slot) thread {
    Costs<Step<H, In, Out>::outputs> out;
    const float now = target;
    target = targets[(t + 1) % kSteps ^ args.rotation];  // here a step later
    // Never: so that compilers cannot know the values to be the same at every step. They would convert them to floats
    // once for all, which take twice the registers, where halves as operands are free.
    if (now > kUnreachable) {
      hold_values();
    }
    minima<In, Out>(now, in, out);
    until_kept -= 1;
    // What is before the last step ranks the ends of free paths; what is after it is not wanted.
    const bool last = t + 2 == kSteps;
    const bool keep = t >= args.first_kept && (last || (until_kept == 0 && t + 1 < kSteps));
    exchange<In, Out>(out, next, keep, (last ? args.slots - 1 : slot) << (16 - Shares<H>::even));
    slot += until_kept == 0 ? 1 : 0;
    until_kept = until_kept == 0 ? args.stride : until_kept;
  }

  METAL_FUNC void run(constant MarlinViterbiArgs& args, uint seam) thread {
    constexpr int even = Shares<H>::even;
    constexpr int odd = Shares<H>::odd;
    Costs<Step<H, even, odd>::inputs> in;
    MARLIN_UNROLL
    for (int i = 0; i < Step<H, even, odd>::inputs; ++i) {
      constexpr int split = Step<H, even, odd>::split;
      const uint high = uint(i >> split) << (kThreadBits + Shares<H>::low - even);
      const uint node = high + first_input<even>() + (uint(i) & ((1u << split) - 1));
      const bool begins = node == (seam & ((1u << (16 - even)) - 1));
      in.of[i] = args.forced && !begins ? kUnreachable : 0.0f;
    }
    float target = targets[args.rotation];
    uint until_kept = args.stride;
    uint slot = 0;
    if constexpr (even == odd) {
      for (uint t = 0; t + 1 < kSteps; ++t) {
        Costs<Step<H, even, even>::inputs> next;
        advance<even, even>(t, args, in, next, target, until_kept, slot);
        in = next;
      }
    } else {
      for (uint t = 0; t < kSteps; t += 2) {
        Costs<Step<H, odd, even>::inputs> between;
        advance<even, odd>(t, args, in, between, target, until_kept, slot);
        advance<odd, even>(t + 1, args, between, in, target, until_kept, slot);
      }
    }
  }
};

template <int H>
[[kernel, max_total_threads_per_threadgroup(MARLIN_SOURCE_max_threads)]] void trellis_viterbi(
    constant MarlinViterbiArgs& args [[buffer(0)]],
    device const float* tiles [[buffer(1)]],
    device const half* values [[buffer(2)]],
    device const ushort* states [[buffer(3)]],
    device float* history [[buffer(4)]],
    threadgroup float* nodes [[threadgroup(0)]],
    uint tile [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  constexpr int lanes = Shares<H>::lanes;
  Forward<H> body;
  body.targets = tiles + tile * kSteps;
  body.table = values;
  body.history = history + tile * (args.slots << (16 - Shares<H>::even));
  body.nodes = nodes;
  body.index = index;
  body.middle = ((index & ((1u << lanes) - 1)) << (kThreadBits - lanes)) | (index >> lanes);
  body.hold_values();
  const uint seam = args.forced ? uint(states[tile * kSteps + kSteps - 1]) : 0u;
  body.run(args, seam);
}
