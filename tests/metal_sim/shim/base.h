// Address spaces, scalar types, and the calls into the runtime (runtime/) for everything that needs
// more than one thread.
#pragma once

#include "op_codes.h"

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define MSL_INL inline __attribute__((always_inline))
#ifdef MSL_POINTER_PASS
// address_spaces.py says why.
#define MSL_D __constant
#define MSL_G __constant
#else
#define MSL_D __global
#define MSL_G __local
#endif
#define MSL_C __constant
#ifdef MSL_PRIVATE_THREAD
// metal41.py says why.
#define MSL_T __private
#else
// `thread` is the generic address space: clang mishandles class temporaries without it.
#define MSL_T
#endif
#define MSL_SITE uint _l = __builtin_LINE(), uint _c = __builtin_COLUMN()
#define MSL_AT (_l << 10 | (_c & 1023))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef long intptr_t;
typedef __bf16 bfloat;

extern "C" {
// Operation codes: op_codes.h; type codes: msl_code below
void msl_simd(int op, int type, int ncomp, int size, MSL_T const void* in, MSL_T void* out,
              uint arg, uint site) __attribute__((convergent));
void msl_barrier(int flags, uint site) __attribute__((convergent));
ulong msl_atomic(int op, int type, ulong addr, ulong val, ulong expect, uint site);
ulong msl_tg(uint key, ulong size);
half msl_fma_half(half a, half b, half c);
void msl_lane_index(MSL_T uint* out);
float acoshf(float);
float asinhf(float);
float atanhf(float);
float ldexpf(float, int);
int ilogbf(float);
float frexpf(float, MSL_T int*);
float nextafterf(float, float);
}
template <class T>
MSL_G T& msl_tgvar(uint key) {
  return *(MSL_G T*)msl_tg(key, sizeof(T));
}
