// Instruction sets that a program is built without. Weak: those that are linked in win.
#include <cstdlib>

#include "cpu/instruction_set.h"
#include "cpu/tier.h"

namespace mlx_marlin::cpu {

#define MARLIN_LEFT_OUT(name)                      \
  namespace name {                                 \
  __attribute__((weak)) const Tier& tier_table() { \
    std::abort();                                  \
  }                                                \
  }
MARLIN_INSTRUCTION_SETS(MARLIN_LEFT_OUT)
#undef MARLIN_LEFT_OUT

}  // namespace mlx_marlin::cpu
