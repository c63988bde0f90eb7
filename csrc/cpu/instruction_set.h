// The instruction sets that code is compiled for: their order, which of them this machine runs, and the one in use. The
// kernels (tier.h) and the encoder's search (viterbi/) have a table of functions for each set, or for the set before it.
#pragma once

#include <string>
#include <vector>

namespace mlx_marlin::cpu {

// Best last.
#if defined(__x86_64__)
#define MARLIN_INSTRUCTION_SETS(X) X(baseline) X(avx2) X(avx512) X(avx512vbmi) X(avx512vnni) X(avx512fp16)
#elif defined(__aarch64__)
#define MARLIN_INSTRUCTION_SETS(X) X(baseline) X(neon) X(neonfp16)
#else
#define MARLIN_INSTRUCTION_SETS(X) X(baseline)
#endif

#define MARLIN_ENUMERATOR(name) name,
enum class InstructionSet { MARLIN_INSTRUCTION_SETS(MARLIN_ENUMERATOR) };
#undef MARLIN_ENUMERATOR

InstructionSet instruction_set();  // the one in use: the best, unless set
const char* name_of(InstructionSet);

std::vector<std::string> compiled_instruction_sets();  // those of this build
std::vector<std::string> instruction_sets();           // those of them that this machine can run
void set_instruction_set(const std::string& name);     // "auto" or one of instruction_sets(); throws

}  // namespace mlx_marlin::cpu
