// Constants and typed access to x and y.
#pragma once

// Before Metal 4 `if constexpr` and hexadecimal floats are extensions, whose warnings would come before the errors in
// what a failed build says.
#pragma clang diagnostic ignored "-Wc++17-extensions"

#include <metal_stdlib>

#include "args.h"
#include "format.h"

using namespace metal;

// Arrays stay in registers only where every index is known.
#define MARLIN_UNROLL _Pragma("clang loop unroll(full)")

#define MARLIN_DECLARE(name) constant constexpr uint name = MARLIN_SOURCE_##name;
MARLIN_SOURCE_CONSTANTS(MARLIN_DECLARE)
#undef MARLIN_DECLARE

#define MARLIN_DECLARE(index, type, name) constant type name [[function_constant(index)]];
MARLIN_FUNCTION_CONSTANTS(MARLIN_DECLARE)
#undef MARLIN_DECLARE

// Element of x or y, whose dtype is a function constant.
METAL_FUNC float load_element(device const uchar* x, ulong index) {
  if (dtype == MARLIN_DTYPE_FLOAT32) {
    return ((device const float*)x)[index];
  }
  if (dtype == MARLIN_DTYPE_FLOAT16) {
    return float(((device const half*)x)[index]);
  }
  return float(((device const bfloat*)x)[index]);
}

METAL_FUNC void store_element(device uchar* y, ulong index, float value) {
  if (dtype == MARLIN_DTYPE_FLOAT32) {
    ((device float*)y)[index] = value;
  } else if (dtype == MARLIN_DTYPE_FLOAT16) {
    ((device half*)y)[index] = half(value);
  } else {
    ((device bfloat*)y)[index] = bfloat(value);
  }
}
