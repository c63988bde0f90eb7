// Runs cases from a file through the CPU kernels and writes the results to another. The tests build it for a foreign
// CPU and with sanitizers: argv = instruction set, cases, results.
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/pool.h"
#include "kernel_cases.h"

using namespace mlx_marlin::cpu;

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s INSTRUCTION_SET CASES RESULTS\n", argv[0]);
    return 2;
  }
  set_instruction_set(argv[1]);
  set_threads(2);
  const KernelCases cases(argv[2]);
  FILE* out = open_file(argv[3], "wb");
  cases.each([out](const auto& one) {
    const std::vector<uint8_t> result = one.run(2);
    if (!result.empty()) {  // fwrite takes no null pointer
      std::fwrite(result.data(), 1, result.size(), out);
    }
  });
  return std::fclose(out) == 0 ? 0 : 1;
}
