// Callbacks of -fsanitize=undefined, and what compiler-rt would bring.
#pragma once

#include "report.h"

// ---- undefined behaviour
struct Loc {
  const char* file;
  u32 line, col;
};
static __attribute__((noreturn)) void ub(Loc* l, const char* what, uptr pc) {
  fail(pc, "undefined behaviour: %s at %s:%u:%u", what, l->file ? l->file : "?", l->line, l->col);
}
#define UB(name, what, ...)                             \
  X void __ubsan_handle_##name(Loc* l, ##__VA_ARGS__) { \
    ub(l, what, PC);                                    \
  }
UB(out_of_bounds, "array index out of bounds")
UB(shift_out_of_bounds, "shift amount out of range")
UB(divrem_overflow, "division by zero or overflow")
UB(add_overflow, "signed integer overflow (+)")
UB(sub_overflow, "signed integer overflow (-)")
UB(mul_overflow, "signed integer overflow (*)")
UB(negate_overflow, "signed integer overflow (unary -)")
UB(load_invalid_value, "bool or enum holds an invalid value")
UB(float_cast_overflow, "float to integer conversion out of range")
UB(builtin_unreachable, "unreachable code reached")
UB(missing_return, "no return value")
UB(pointer_overflow, "pointer overflow")
UB(vla_bound_not_positive, "array size not positive")
UB(invalid_builtin, "ctz/clz of zero")
X void __ubsan_handle_type_mismatch_v1(Loc* l, uptr p) {
  char m[96];
  snprintf(
      m, sizeof m, p < 65536 ? "null pointer (unbound buffer?)" : "misaligned address %#lx for the accessed type", p);
  ub(l, m, PC);
}

// ---- compiler-rt pieces and helpers
X u16 __truncsfbf2_bits(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) {
    return u >> 16 | 0x40;
  }
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
X __bf16 __truncsfbf2(float f) {
  u16 b = __truncsfbf2_bits(f);
  __bf16 r;
  memcpy(&r, &b, 2);
  return r;
}
X _Float16 msl_fma_half(
    _Float16 a, _Float16 b,
    _Float16 c) {  // exact in 64 bits of mantissa; then one rounding (sticky
                   // bit guards double rounding through float)
  long double x = (long double)(float)a * (float)b + (float)c;
  float f = (float)x;
  long double back = f;
  if (back != x && isfinite(f)) {
    u32 u;
    memcpy(&u, &f, 4);
    if ((back > x) == (f > 0)) {
      u--;
    }
    u |= 1;
    memcpy(&f, &u, 4);
  }
  return (_Float16)f;
}
