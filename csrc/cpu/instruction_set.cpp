// Which instruction set runs. Built for the baseline, so that it may run anywhere.
#include <atomic>
#include <stdexcept>

#include "cpu/kernels.h"
#include "cpu/tier.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlx_marlin::cpu {

#define MARLIN_DECLARE_TIER(name) \
  namespace name {                \
  const Tier& tier_table();       \
  }

MARLIN_DECLARE_TIER(baseline)
#if defined(__x86_64__)
MARLIN_DECLARE_TIER(avx2)
MARLIN_DECLARE_TIER(avx512)
MARLIN_DECLARE_TIER(avx512vbmi)
MARLIN_DECLARE_TIER(avx512vnni)
MARLIN_DECLARE_TIER(avx512fp16)
#elif defined(__aarch64__)
MARLIN_DECLARE_TIER(neon)
MARLIN_DECLARE_TIER(neonfp16)
#endif

namespace {

struct Entry {
  const char* name;
  bool (*supported)();
  const Tier& (*table)();
};

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
  return has_avx512vbmi() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
}
#elif defined(__aarch64__)
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

// Best last.
const Entry kEntries[] = {
    {"baseline", [] { return true; }, baseline::tier_table},
#if defined(__x86_64__)
    {"avx2", has_avx2, avx2::tier_table},
    {"avx512", has_avx512, avx512::tier_table},
    {"avx512vbmi", has_avx512vbmi, avx512vbmi::tier_table},
    {"avx512vnni", has_avx512vnni, avx512vnni::tier_table},
    {"avx512fp16", has_avx512fp16, avx512fp16::tier_table},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, neon::tier_table},  // part of arm64
    {"neonfp16", has_neonfp16, neonfp16::tier_table},
#endif
};

const Entry& best() {
  const Entry* found = nullptr;
  for (const Entry& entry : kEntries) {
    if (entry.supported()) {
      found = &entry;
    }
  }
  return *found;
}

std::atomic<const Tier*>& current() {
  static std::atomic<const Tier*> tier{&best().table()};
  return tier;
}

}  // namespace

const Tier& tier() {
  return *current().load(std::memory_order_acquire);
}

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) {
    names.push_back(entry.name);
  }
  return names;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) {
    if (entry.supported()) {
      names.push_back(entry.name);
    }
  }
  return names;
}

std::string instruction_set() {
  return tier().name;
}

void set_instruction_set(const std::string& name) {
  if (name == "auto") {
    current() = &best().table();
    return;
  }
  std::string known = "auto";
  for (const Entry& entry : kEntries) {
    if (!entry.supported()) {
      continue;
    }
    if (name == entry.name) {
      current() = &entry.table();
      return;
    }
    known += std::string(", ") + entry.name;
  }
  throw std::invalid_argument("this machine runs the instruction sets " + known + "; got \"" + name + "\"");
}

}  // namespace mlx_marlin::cpu
