// Built for the baseline, so that it may run anywhere.
#include "cpu/instruction_set.h"

#include <atomic>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlx_marlin::cpu {

namespace {

bool has_baseline() {
  return true;
}

#if defined(__x86_64__)
bool has_avx2() {
  unsigned a, b, c, d;  // __builtin_cpu_supports knows f16c from GCC 11 and clang 17 on only
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
      (c >> 29 & 1);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512vbmi() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi");
}

bool has_avx512vnni() {
  return has_avx512vbmi() && __builtin_cpu_supports("avx512vnni");
}

// __builtin_cpu_supports learned this name later than the compilers learned the instructions.
bool has_avx512fp16() {
  unsigned a, b, c, d;
  return has_avx512vnni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
}
#elif defined(__aarch64__)
bool has_neon() {
  return true;  // part of arm64
}

bool has_neonfp16() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDHP;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_FP16", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

struct Known {
  const char* name;
  bool (*supported)();
};

// By position: InstructionSet.
constexpr Known kKnown[] = {
#define MARLIN_KNOWN(name) {#name, has_##name},
    MARLIN_INSTRUCTION_SETS(MARLIN_KNOWN)
#undef MARLIN_KNOWN
};

InstructionSet best() {
  size_t found = std::size(kKnown) - 1;
  while (!kKnown[found].supported()) {
    --found;
  }
  return static_cast<InstructionSet>(found);
}

std::atomic<InstructionSet>& current() {
  static std::atomic<InstructionSet> set{best()};
  return set;
}

}  // namespace

InstructionSet instruction_set() {
  return current().load(std::memory_order_relaxed);
}

const char* name_of(InstructionSet set) {
  return kKnown[static_cast<size_t>(set)].name;
}

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const Known& known : kKnown) {
    names.push_back(known.name);
  }
  return names;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Known& known : kKnown) {
    if (known.supported()) {
      names.push_back(known.name);
    }
  }
  return names;
}

void set_instruction_set(const std::string& name) {
  if (name == "auto") {
    current() = best();
    return;
  }
  std::string runnable = "auto";
  for (size_t i = 0; i < std::size(kKnown); ++i) {
    if (!kKnown[i].supported()) {
      continue;
    }
    if (name == kKnown[i].name) {
      current() = static_cast<InstructionSet>(i);
      return;
    }
    runnable += std::string(", ") + kKnown[i].name;
  }
  throw std::invalid_argument("this machine runs the instruction sets " + runnable + "; got \"" + name + "\"");
}

}  // namespace mlx_marlin::cpu
