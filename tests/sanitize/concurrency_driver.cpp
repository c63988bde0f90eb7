// The pool, the kernels and the encoder's search under several callers. Every result must be that of one thread.
// argv = instruction set, cases, and one of
//   resize  while the number of threads changes
//   fork    while children are forked that compute themselves
//   exit    ends while calls are under way
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <string>
#include <thread>

#include "cpu/instruction_set.h"
#include "cpu/pool.h"
#include "kernel_cases.h"
#include "viterbi/search.h"

using namespace mlx_marlin;

namespace {

constexpr int kCallers = 3;
constexpr int kRounds = 4;    // of all jobs, by each caller
constexpr int kChildren = 4;  // enough that some are forked in the middle of a job
constexpr int kThreads = 4;   // more than there are cores on most machines that run this

constexpr int kTiles = 2;  // of a search, which takes longer than all kernels together
constexpr int kBits = 4;

// Numbers in [-0.5, 0.5), the same in every run (Knuth's multiplicative hash).
std::vector<float> scattered(uint32_t count) {
  std::vector<float> numbers;
  for (uint32_t i = 0; i < count; ++i) {
    numbers.push_back(static_cast<float>(i * 2654435761u >> 16) / 65536.0f - 0.5f);
  }
  return numbers;
}

struct Job {
  std::function<std::vector<uint8_t>(int threads)> run;
  std::vector<uint8_t> expected;
};

// Never destroyed: in `exit` the callers outlive main.
std::vector<Job>& jobs() {
  static auto* all = new std::vector<Job>;
  return *all;
}

void check(const Job& job, int threads) {
  if (job.run(threads) != job.expected) {
    std::fprintf(stderr, "another result with %d threads\n", threads);
    std::_Exit(1);
  }
}

// One caller's rounds; callers begin at different jobs.
void call(int caller) {
  const size_t count = jobs().size();
  for (size_t i = 0; i < kRounds * count; ++i) {
    check(jobs()[(i + caller * count / kCallers) % count], 1 + static_cast<int>((i + caller) % kThreads));
  }
}

void make_jobs(const char* path) {
  static const auto* cases = new cpu::KernelCases(path);
  cases->each([](const auto& one) { jobs().push_back({[&one](int threads) { return one.run(threads); }, {}}); });
  static const auto* values = new std::vector<float>(scattered(1 << 16));
  static const auto* tiles = new std::vector<float>(scattered(kTiles * 256));
  jobs().push_back(
      {[](int threads) {
         std::vector<uint16_t> states(tiles->size());
         viterbi::search(tiles->data(), kTiles, values->data(), kBits, states.data(), threads);
         const auto* bytes = reinterpret_cast<const uint8_t*>(states.data());
         return std::vector<uint8_t>(bytes, bytes + 2 * states.size());
       },
       {}});
  for (Job& job : jobs()) {
    job.expected = job.run(1);
  }
}

std::vector<std::thread> start_callers(const std::function<void(int)>& body) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back(body, caller);
  }
  return callers;
}

void resize_while_working() {
  std::atomic<int> working{kCallers};
  auto callers = start_callers([&working](int caller) {
    call(caller);
    --working;
  });
  for (int n = 0; working > 0; ++n) {
    cpu::set_threads(1 + n % kThreads);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
}

void fork_while_working() {
  std::atomic<bool> stop{false};
  auto callers = start_callers([&stop](int caller) {
    while (!stop) {
      call(caller);
    }
  });
  bool good = true;
  for (int child = 0; child < kChildren; ++child) {
    const pid_t pid = fork();
    if (pid == 0) {
      for (const Job& job : jobs()) {
        check(job, 2);
      }
      std::_Exit(0);
    }
    int status = 0;
    good = pid > 0 && waitpid(pid, &status, 0) == pid && status == 0 && good;
  }
  stop = true;
  for (std::thread& caller : callers) {
    caller.join();
  }
  if (!good) {
    std::fprintf(stderr, "a child failed\n");
    std::_Exit(1);
  }
}

void exit_while_working() {
  static std::atomic<int> rounds{0};
  for (std::thread& caller : start_callers([](int caller) {
         while (true) {
           call(caller);
           ++rounds;
         }
       })) {
    caller.detach();
  }
  while (rounds < kCallers) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc == 4 ? argv[3] : "";
  cpu::set_instruction_set(argc > 1 ? argv[1] : "auto");
  cpu::set_threads(kThreads);
  if (mode == "resize") {
    make_jobs(argv[2]);
    resize_while_working();
  } else if (mode == "fork") {
    make_jobs(argv[2]);
    fork_while_working();
  } else if (mode == "exit") {
    make_jobs(argv[2]);
    exit_while_working();
  } else {
    std::fprintf(stderr, "usage: %s INSTRUCTION_SET CASES resize|fork|exit\n", argv[0]);
    return 2;
  }
  std::printf("%zu jobs, %d callers: every result is that of one thread\n", jobs().size(), kCallers);
  std::fflush(stdout);
  return 0;
}
