// The kernels of one instruction set. Compiled once per set with MARLIN_TIER naming it; the compiler
// flags select the vector header.
#include "tier.h"

#include <cstring>

#define MARLIN_STRING_OF(x) #x
#define MARLIN_STRING(x) MARLIN_STRING_OF(x)

#if defined(MARLIN_PORTABLE)  // arm64 compilers define __ARM_NEON for the baseline too
#include "simd_portable.h"
#elif defined(__AVX512BW__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON)
#include "simd_neon.h"
#endif

#include "activation.h"
#include "convert.h"
#include "gemm.h"
#include "hadamard.h"
#include "transposed.h"

namespace mlx_marlin::cpu::MARLIN_TIER {

static const Tier table = {
    MARLIN_STRING(MARLIN_TIER),
    rotate,
    block_rows,
    multiply,
    multiply_scratch,
    multiply_transposed,
    finish,
    activate,
    add_scaled,
    store,
    decode_tile_row};

extern const Tier& tier_table();
const Tier& tier_table() {
  return table;
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
