#include "cpu/pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mlx_marlin::cpu {

namespace {

// Idle workers spin this long before they sleep: longer than the gap between the products of one
// layer, far shorter than anything a user would notice as load.
constexpr auto kSpin = std::chrono::microseconds(40);
constexpr int kPausesPerCheck = 32;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `done()`; after kSpin it also gives its core to whoever holds up the work.
template <typename Done>
void spin_until(Done done) {
  auto start = std::chrono::steady_clock::now();
  while (true) {
    for (int i = 0; i < kPausesPerCheck; ++i) {
      if (done()) {
        return;
      }
      pause();
    }
    if (std::chrono::steady_clock::now() - start > kSpin) {
      std::this_thread::yield();
    }
  }
}

struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

struct Job {
  const std::vector<Phase>* phases;
  std::unique_ptr<Counter[]> counters;
  int seats = 0;               // workers that may still join; guarded by the pool's mutex
  std::atomic<int> active{0};  // workers that have joined and not yet left

  void work() {
    for (size_t p = 0; p < phases->size(); ++p) {
      const Phase& phase = (*phases)[p];
      Counter& counter = counters[p];
      int64_t finished = 0;
      while (true) {
        int64_t task = counter.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= phase.tasks) {
          break;
        }
        phase.run(task);
        ++finished;
      }
      counter.done.fetch_add(finished, std::memory_order_acq_rel);
      spin_until([&] { return counter.done.load(std::memory_order_acquire) >= phase.tasks; });
    }
  }
};

int default_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return std::max(1, CPU_COUNT(&set));
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const {
    return threads_.load();
  }

  void resize(int n) {
    std::lock_guard<std::shared_mutex> alone(sizing_);
    stop_workers();
    threads_ = n;
  }

  // False while the pool changes its size.
  bool run(Job& job, int threads) {
    std::shared_lock<std::shared_mutex> sized(sizing_, std::try_to_lock);
    if (!sized) {
      return false;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers();
      job.seats = std::min<int>(threads - 1, workers_.size());
      jobs_.push_back(&job);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    }
    spin_until([&] { return job.active.load(std::memory_order_acquire) == 0; });
    return true;
  }

 private:
  void start_workers() {
    while (static_cast<int>(workers_.size()) < threads_ - 1) {
      workers_.emplace_back([this, seen = generation_.load()] { serve(seen); });
    }
  }

  void stop_workers() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) {
      worker.join();
    }
    workers_.clear();
    stop_ = false;
  }

  void serve(uint64_t seen) {
    while (true) {
      auto start = std::chrono::steady_clock::now();
      while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() - start < kSpin) {
        for (int i = 0; i < kPausesPerCheck && generation_.load() == seen; ++i) {
          pause();
        }
      }
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        if (stop_) {
          return;
        }
        job = take_seat();
        // Where there are more jobs, they are looked at again after this one.
        if (!job || jobs_.size() == 1) {
          seen = generation_.load();
        }
      }
      if (job) {
        job->work();
        job->active.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  // A place in the oldest job that has one.
  Job* take_seat() {
    for (Job* job : jobs_) {
      if (job->seats > 0) {
        --job->seats;
        job->active.fetch_add(1, std::memory_order_relaxed);
        return job;
      }
    }
    return nullptr;
  }

  std::shared_mutex sizing_;  // shared by the threads whose jobs run
  std::mutex mutex_;          // guards jobs_, their seats, workers_ and stop_
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> threads_;
  std::vector<Job*> jobs_;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

// Never destroyed: workers may outlive static destructors. A forked child has no worker threads, so it
// gets a pool of its own.
std::atomic<Pool*> instance{nullptr};

Pool& pool() {
  static bool created = [] {
    instance = new Pool(default_threads());
    pthread_atfork(nullptr, nullptr, [] { instance = new Pool(instance.load()->threads()); });
    return true;
  }();
  (void)created;
  return *instance.load();
}

}  // namespace

void run_phases(const std::vector<Phase>& phases, int threads) {
  Job job{&phases, std::make_unique<Counter[]>(phases.size())};
  threads = std::clamp(threads, 1, pool().threads());
  if (threads == 1 || !pool().run(job, threads)) {
    job.work();
  }
}

void set_threads(int n) {
  if (n < 1) {
    throw std::invalid_argument("the number of threads must be at least 1, got " + std::to_string(n));
  }
  pool().resize(n);
}

int threads() {
  return pool().threads();
}

namespace {
constexpr std::align_val_t kAlignment{64};
// A layer's scratch for a few hundred rows stays; more is given back after the call.
constexpr int64_t kKeepFloats = 16 << 20;
}  // namespace

Scratch::~Scratch() {
  ::operator delete[](data_, kAlignment);
}

float* Scratch::floats(int64_t count) {
  if (count > count_) {
    ::operator delete[](data_, kAlignment);
    data_ = nullptr;
    count_ = 0;
    data_ = static_cast<float*>(::operator new[](count * sizeof(float), kAlignment));
    count_ = count;
  }
  return data_;
}

void Scratch::trim() {
  if (count_ > kKeepFloats) {
    ::operator delete[](data_, kAlignment);
    data_ = nullptr;
    count_ = 0;
  }
}

Scratch& task_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace mlx_marlin::cpu
