// Plans calls from a file of integers and prints for each how many dispatches and bytes of scratch it takes, or why it
// is refused: argv = calls.
#include <stdexcept>

#include "open_file.h"
#include "plan/plan.h"

using namespace mlx_marlin;

namespace {

bool read(FILE* file, int64_t& value) {
  return std::fscanf(file, "%ld", &value) == 1;
}

int64_t next(FILE* file) {
  int64_t value = 0;
  if (!read(file, value)) {
    std::fprintf(stderr, "the file of calls ends early\n");
    std::exit(1);
  }
  return value;
}

int number(FILE* file) {
  return static_cast<int>(next(file));
}

StackInfo stack(FILE* file) {
  StackInfo info{};
  info.experts = number(file);
  info.k = number(file);
  info.n = number(file);
  info.bias = number(file) != 0;
  info.widths = static_cast<uint32_t>(next(file));
  info.codebooks = static_cast<uint32_t>(next(file));
  return info;
}

KernelConfig config(FILE* file) {
  KernelConfig config{};
  config.variant = static_cast<Variant>(number(file));
  config.tile_size_m = number(file);
  config.tile_size_n = number(file);
  config.simdgroups = number(file);
  config.use_fp32_acc = number(file) != 0;
  return config;
}

// 0, rows, dtype, in, out, x_divisor, gathered, transposed, stack, config
Plan linear(FILE* file) {
  const int64_t rows = next(file);
  const int dtype = number(file);
  LinearCall call{};
  call.in_features = number(file);
  call.out_features = number(file);
  call.x_divisor = number(file);
  call.gathered = number(file) != 0;
  call.transposed = number(file) != 0;
  call.stack = stack(file);
  call.config = config(file);
  return plan_linear(call, rows, dtype);
}

// 1, rows, top_k, dtype, hidden, activation, combine, gated, gate if gated, up, down, config
Plan swiglu(FILE* file) {
  const int64_t rows = next(file);
  const int top_k = number(file);
  const int dtype = number(file);
  SwigluCall call{};
  call.hidden = number(file);
  call.activation = number(file);
  call.alpha = 1.0f;
  call.limit = 1.0f;
  call.combine = number(file) != 0;
  call.gated = number(file) != 0;
  if (call.gated) {
    call.gate = stack(file);
  }
  call.up = stack(file);
  call.down = stack(file);
  call.config = config(file);
  return plan_swiglu(call, rows, top_k, dtype);
}

// 2, expert, stack
Plan decode(FILE* file) {
  DecodeCall call{};
  call.expert = number(file);
  call.stack = stack(file);
  return plan_decode(call);
}

// 3, tiles, half bits, codebook
Plan viterbi(FILE* file) {
  const int64_t tiles = next(file);
  ViterbiCall call{};
  call.half_bits = number(file);
  call.codebook = number(file);
  return plan_viterbi(call, tiles);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s CALLS\n", argv[0]);
    return 2;
  }
  FILE* file = open_file(argv[1], "r");
  int64_t kind = 0;
  while (read(file, kind)) {
    try {
      const Plan plan = kind == 0 ? linear(file) : kind == 1 ? swiglu(file) : kind == 2 ? decode(file) : viterbi(file);
      uint64_t bytes = 0;
      for (const auto& [name, size] : plan.scratch) {
        bytes += size;
      }
      size_t text = 0;
      for (const Dispatch& d : plan.dispatches) {
        text += d.library("").size() + d.host_name().size() + d.stem().size();
      }
      std::printf("%zu %lu\n", plan.dispatches.size(), bytes);
      if (!plan.dispatches.empty() && text == 0) {
        return 1;
      }
    } catch (const std::invalid_argument& error) {
      std::printf("%s\n", error.what());
    }
  }
  std::fclose(file);
  return 0;
}
