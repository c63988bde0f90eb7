// The kernels of one instruction set. Compiled once per set with MARLIN_TIER naming it; the compiler
// flags select the vector header.
#include "cpu/tier.h"

#include <cstring>

#if defined(MARLIN_PORTABLE)  // arm64 compilers define __ARM_NEON for the baseline too
#include "cpu/simd/portable.h"
#elif defined(__AVX512BW__)
#include "cpu/simd/avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/avx2.h"
#elif defined(__ARM_NEON)
#include "cpu/simd/neon.h"
#endif

#include "cpu/tier/activation.h"
#include "cpu/tier/convert.h"

#include "cpu/tier/attention.h"
#include "cpu/tier/embedding.h"
#include "cpu/tier/gemm.h"
#include "cpu/tier/hadamard.h"
#include "cpu/tier/integer.h"
#include "cpu/tier/transposed.h"

namespace mlx_marlin::cpu::MARLIN_TIER {

static const Tier table = {
    {row_floats, rotate_rows, multiply, multiply_scratch},
    {integer_row_floats, rotate_integers, multiply_integers, integer_scratch},
    rotate,
    multiply_transposed,
    finish,
    activate,
    add_scaled,
    store,
    widen,
    decode_tile_row,
    embed,
    attend,
    finish_attention,
    attention_state,
    attention_scratch};

extern const Tier& tier_table();
const Tier& tier_table() {
  return table;
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
