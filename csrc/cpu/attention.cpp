// Softmax attention: tasks are blocks of query rows that share keys, where those are few also runs of keys.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/tier.h"

namespace mlx_marlin::cpu {

namespace {

// Query rows that share loaded keys and values: 64 rows of 128 queries and as many sums take 64 KB of the L2 cache.
constexpr int kQueryRows = 64;

// Keys of one task where the rows alone are too few tasks: 512 keys of 128 values are 0.5 MB, some 50 us.
constexpr int64_t kSplitKeys = 512;

// Tasks that keep the cores of a large machine busy. The number of threads must not decide: it would change the bits.
constexpr int64_t kEnoughTasks = 64;

// Runs of keys become longer where there would be more tasks: what they leave would take gigabytes at 100k keys.
constexpr int64_t kMostTasks = 4 * kEnoughTasks;

// Floating-point operations that one thread does sooner than others wake: some 30 us.
constexpr int64_t kWakeWork = 1'000'000;

}  // namespace

void attention(const AttentionArgs& args, int threads) {
  const Tier& tier = cpu::tier();
  const int64_t work = 2 * int64_t{args.batches} * args.heads * args.repeats * args.query_count * args.key_count *
      (args.key_size + args.value_size);
  threads = work < kWakeWork ? 1 : threads;
  const int rows = args.query_count * args.repeats;
  const int block = std::min(rows, kQueryRows);
  const int64_t blocks = rows ? (rows + block - 1) / block : 0;
  const int64_t row_tasks = static_cast<int64_t>(args.batches) * args.heads * blocks;
  const bool split = row_tasks < kEnoughTasks && args.key_count > kSplitKeys;
  const int64_t share = args.key_count * row_tasks / kMostTasks + 1;
  const int64_t keys = split ? std::max(kSplitKeys, share) : std::max<int64_t>(args.key_count, 1);
  const int parts = static_cast<int>(std::max<int64_t>((args.key_count + keys - 1) / keys, 1));
  const int64_t state = tier.attention_state(args, block);

  // Causal rows of later positions look at more keys: the longest tasks come first.
  const auto task_of = [&](int64_t index, int part) {
    index = row_tasks - 1 - index;
    const int64_t heads = static_cast<int64_t>(args.batches) * args.heads;
    const int64_t first = index / heads * block, head = index % heads;
    return AttentionTask{
        .batch = static_cast<int>(head / args.heads),
        .head = static_cast<int>(head % args.heads),
        .row = static_cast<int>(first),
        .rows = static_cast<int>(std::min<int64_t>(block, rows - first)),
        .first_key = part * keys,
        .last_key = std::min<int64_t>(args.key_count, (part + 1) * keys)};
  };
  const int64_t scratch = tier.attention_scratch(args, block);
  if (parts == 1) {
    const auto whole = [&](int64_t index) {
      const AttentionTask task = task_of(index, 0);
      float* memory = task_scratch().floats(scratch + state);
      tier.attend(args, task, memory, memory + scratch);
      tier.finish_attention(args, task, memory + scratch, state, 1);
    };
    return run_phases({{row_tasks, whole}}, threads);
  }
  Scratch states;
  float* memory = states.floats(row_tasks * parts * state);
  const auto attend = [&](int64_t index) {
    float* to = memory + index * state;
    tier.attend(args, task_of(index / parts, static_cast<int>(index % parts)), task_scratch().floats(scratch), to);
  };
  const auto finish = [&](int64_t index) {
    tier.finish_attention(args, task_of(index, 0), memory + index * parts * state, state, parts);
  };
  run_phases({{row_tasks * parts, attend}, {row_tasks, finish}}, threads);
}

}  // namespace mlx_marlin::cpu
