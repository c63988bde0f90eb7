// The worker pool: threads that sleep between jobs. A job is a list of phases that run one after the
// other; the tasks of a phase run in any order on any thread, the calling thread among them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace mlx_marlin::cpu {

struct Phase {
  int64_t tasks;
  std::function<void(int64_t)> run;
};

// Runs the phases on up to `threads` threads. Jobs of several callers share the workers; a caller for whom none is left
// does all the work itself.
void run_phases(const std::vector<Phase>& phases, int threads);

void set_threads(int n);  // n >= 1; throws
int threads();            // workers and the calling thread

// 64-byte aligned memory that grows and is reused. Contents are lost when it grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  float* floats(int64_t count);
  void trim();  // gives back memory above the size that is worth keeping

 private:
  float* data_ = nullptr;
  int64_t count_ = 0;
};

// The calling thread's own scratch, for use inside one task.
Scratch& task_scratch();

}  // namespace mlx_marlin::cpu
