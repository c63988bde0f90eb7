#include "viterbi/search.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>

#include "viterbi/encoder.h"

namespace mlx_marlin::viterbi {
namespace {

struct InstructionSet {
  const char* name;
  const Encoder* (*encoders)();
  bool (*runs)();
};

const std::vector<InstructionSet>& all() {
  static const std::vector<InstructionSet> sets = {
      {"baseline", encoders_baseline, [] { return true; }},
#if defined(__x86_64__)
      {"avx2", encoders_avx2, [] { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma"); }},
      {"avx512", encoders_avx512, [] { return bool(__builtin_cpu_supports("avx512f")); }},
#elif defined(__aarch64__)
      {"neon", encoders_neon, [] { return true; }},
#endif
  };
  return sets;
}

const InstructionSet* best() {
  const InstructionSet* result = nullptr;
  for (auto& set : all()) {
    if (set.runs()) {
      result = &set;
    }
  }
  return result;
}

std::atomic<const InstructionSet*>& selected() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

struct Aligned {
  void operator()(float* p) const {
    ::operator delete[](p, std::align_val_t(64));
  }
};
using Buffer = std::unique_ptr<float[], Aligned>;

Buffer allocate(int64_t floats) {
  return Buffer(static_cast<float*>(::operator new[](size_t(floats) * sizeof(float), std::align_val_t(64))));
}

// Scratch is tens of megabytes and LDLQ searches a few tiles at a time: fresh pages would cost more
// than the search, so a worker's scratch is kept for the next one. All have the size that the most
// demanding K of the instruction set needs.
class ScratchPool {
 public:
  using Entry = std::pair<int64_t, Buffer>;
  Entry take(int64_t floats) {
    {
      std::lock_guard lock(mutex_);
      while (!free_.empty()) {
        Entry found = std::move(free_.back());
        free_.pop_back();
        if (found.first >= floats) {
          return found;
        }
      }
    }
    return {floats, allocate(floats)};
  }
  void give(Entry entry) {
    std::lock_guard lock(mutex_);
    if (free_.size() < std::max(1u, std::thread::hardware_concurrency())) {
      free_.push_back(std::move(entry));
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Entry> free_;
};

ScratchPool& scratch_pool() {
  static ScratchPool pool;
  return pool;
}

}  // namespace

void search(const float* tiles, int64_t count, const float* values, int bits, uint16_t* states, int threads) {
  if (bits < 1 || bits > 8) {
    throw std::invalid_argument("bits must be in 1..8, got " + std::to_string(bits));
  }
  if (threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  }
  const Encoder* encoders = selected().load()->encoders();
  const Encoder& encoder = encoders[bits - 1];
  Buffer table = allocate(1 << 16);
  encoder.arrange(values, table.get());
  const int64_t batches = (count + encoder.tiles - 1) / encoder.tiles;
  std::atomic<int64_t> next{0};
  auto work = [&](float* scratch) {
    for (int64_t b; (b = next.fetch_add(1)) < batches;) {
      const int64_t first = b * encoder.tiles;
      const int size = int(std::min<int64_t>(encoder.tiles, count - first));
      encoder.run(tiles + first * 256, size, values, table.get(), scratch, states + first * 256);
    }
  };
  const int workers = int(std::min<int64_t>(threads, batches));
  int64_t floats = 0;
  for (int k = 0; k < 8; ++k) {
    floats = std::max(floats, encoders[k].scratch_floats);
  }
  std::vector<ScratchPool::Entry> scratch;
  for (int i = 0; i < workers; ++i) {
    scratch.push_back(scratch_pool().take(floats));
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < workers; ++i) {
    helpers.emplace_back(work, scratch[i].second.get());
  }
  if (workers) {
    work(scratch[0].second.get());
  }
  for (auto& helper : helpers) {
    helper.join();
  }
  for (auto& entry : scratch) {
    scratch_pool().give(std::move(entry));
  }
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (auto& set : all()) {
    if (set.runs()) {
      names.emplace_back(set.name);
    }
  }
  return names;
}

std::string instruction_set() {
  return selected().load()->name;
}

void set_instruction_set(const std::string& name) {
  if (name == "auto") {
    selected() = best();
    return;
  }
  std::string known;
  for (auto& set : all()) {
    if (!set.runs()) {
      continue;
    }
    if (name == set.name) {
      selected() = &set;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + set.name;
  }
  throw std::invalid_argument("instruction set must be auto or one of " + known + ", got " + name);
}

}  // namespace mlx_marlin::viterbi
