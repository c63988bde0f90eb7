// Ceilings of the machine: clock, fp32 multiply-add rate, memory read rate. Prints one JSON object.
// Vector extensions of GCC and clang, so that one source serves every architecture.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t words __attribute__((vector_size(VECTOR_BYTES)));

static double seconds() {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

// Runs work(thread) on every thread at once; seconds from the common start to the last end.
template <class Work>
static double timed(int threads, Work work) {
  std::vector<std::thread> pool;
  const double start = seconds();
  for (int t = 1; t < threads; ++t) {
    pool.emplace_back(work, t);
  }
  work(0);
  for (auto& thread : pool) {
    thread.join();
  }
  return seconds() - start;
}

// A chain of dependent one-cycle additions: the clock that the core really runs at.
static double clock_ghz() {
  constexpr int64_t steps = 200'000'000;
  uint64_t x = 1, y = 3;
  asm volatile("" : "+r"(y));  // not a constant: recent cores add constants at no cost
  const double start = seconds();
  for (int64_t i = 0; i < steps; i += 8) {
    for (int j = 0; j < 8; ++j) {
      x += y;
      asm volatile("" : "+r"(x));
    }
  }
  return steps / (seconds() - start) / 1e9;
}

// Twelve independent chains: more than the latency (4 cycles) times the units (2) of current cores need.
static void multiply_add(int64_t steps, volatile float* sink) {
  floats sum[12], factor, term;
  for (size_t j = 0; j < sizeof(floats) / sizeof(float); ++j) {
    factor[j] = 0.999f + *sink;
    term[j] = 0.001f + *sink;
  }
  for (auto& s : sum) {
    s = term;
  }
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& s : sum) {
      s = s * factor + term;
    }
  }
  for (auto& s : sum) {
    sum[0] += s;
  }
  *sink = sum[0][0] * 0.0f;
}

static double fma_gflops(int threads) {
  constexpr int64_t steps = 50'000'000;
  std::vector<float> sinks(threads * 64);
  const double time = timed(threads, [&](int t) { multiply_add(steps, &sinks[t * 64]); });
  return 2.0 * 12 * (sizeof(floats) / sizeof(float)) * steps * threads / time / 1e9;
}

static uint64_t sum_words(const words* data, size_t count) {
  words sum[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    for (size_t j = 0; j < 8; ++j) {
      sum[j] += data[i + j];
    }
  }
  for (size_t j = 1; j < 8; ++j) {
    sum[0] += sum[j];
  }
  return sum[0][0];
}

// Best of three passes over `bytes`, which must be well above the last-level cache.
static double read_gbs(int threads, size_t bytes) {
  const size_t part = bytes / threads / 4096 * 4096;
  std::vector<void*> buffers(threads);
  std::vector<uint64_t> sums(threads * 8);
  timed(threads, [&](int t) {
    buffers[t] = aligned_alloc(4096, part);
    if (!buffers[t]) {
      std::fprintf(stderr, "ceilings: cannot allocate %zu bytes\n", part);
      std::exit(1);
    }
    std::memset(buffers[t], t + 1, part);
  });
  double best = 1e30;
  for (int pass = 0; pass < 3; ++pass) {
    const double time = timed(
        threads, [&](int t) { sums[t * 8] += sum_words(static_cast<const words*>(buffers[t]), part / sizeof(words)); });
    best = time < best ? time : best;
  }
  volatile uint64_t sink = sums[0];
  (void)sink;
  for (void* buffer : buffers) {
    std::free(buffer);
  }
  return double(part) * threads / best / 1e9;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: ceilings THREADS BYTES\n");
    return 2;
  }
  const int threads = std::atoi(argv[1]);
  const size_t bytes = std::strtoull(argv[2], nullptr, 10);
  std::printf(
      "{\"clock_ghz\": %.3f, \"fma_gflops\": %.1f, \"read_gbs\": %.2f, \"vector_bits\": %d}\n", clock_ghz(),
      fma_gflops(threads), read_gbs(threads, bytes), VECTOR_BYTES * 8);
  return 0;
}
