#include "cpu/tier.h"

#include "cpu/instruction_set.h"

namespace mlx_marlin::cpu {

#define MARLIN_DECLARE(name) \
  namespace name {           \
  const Tier& tier_table();  \
  }
MARLIN_INSTRUCTION_SETS(MARLIN_DECLARE)
#undef MARLIN_DECLARE

const Tier& tier() {
  using Table = const Tier& (*)();
#define MARLIN_TABLE(name) name::tier_table,
  static constexpr Table tables[] = {MARLIN_INSTRUCTION_SETS(MARLIN_TABLE)};
#undef MARLIN_TABLE
  return tables[static_cast<int>(instruction_set())]();
}

void widen(DType dtype, const uint16_t* x, int64_t count, float* out) {
  tier().widen(dtype, x, count, out);
}

}  // namespace mlx_marlin::cpu
