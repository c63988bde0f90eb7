#pragma once

namespace metal {
// ---- math.  Like Apple's headers: plain overloads per type (so a mixed-type call is ambiguous),
// none for bfloat.
#define MSL_H1(n, T, F, W) \
  MSL_INL T n(T x) { return __builtin_convertvector(n(__builtin_convertvector(x, F)), T); }
#define MSL_F1(n, e) \
  MSL_INL float n(float x) { return e; } \
  MSL_INL float2 n(float2 x) { return e; } \
  MSL_INL float3 n(float3 x) { return e; } \
  MSL_INL float4 n(float4 x) { return e; } \
  MSL_H1A(n)
#define MSL_S1(n, e) \
  MSL_INL float n(float x) { return e; } \
  MSL_INL float2 n(float2 x) { return float2{n(x.x), n(x.y)}; } \
  MSL_INL float3 n(float3 x) { return float3{n(x.x), n(x.y), n(x.z)}; } \
  MSL_INL float4 n(float4 x) { return float4{n(x.x), n(x.y), n(x.z), n(x.w)}; } \
  MSL_H1A(n)
#define MSL_H1A(n) \
  MSL_INL half n(half x) { return (half)n((float)x); } \
  MSL_H1(n, half2, float2, 2) \
  MSL_H1(n, half3, float3, 3) \
  MSL_H1(n, half4, float4, 4)
#define MSL_H2(n, T, F) \
  MSL_INL T n(T x, T y) { \
    return __builtin_convertvector( \
        n(__builtin_convertvector(x, F), __builtin_convertvector(y, F)), T); \
  }
#define MSL_F2(n, e) \
  MSL_INL float n(float x, float y) { return e; } \
  MSL_INL float2 n(float2 x, float2 y) { return e; } \
  MSL_INL float3 n(float3 x, float3 y) { return e; } \
  MSL_INL float4 n(float4 x, float4 y) { return e; } \
  MSL_INL half n(half x, half y) { return (half)n((float)x, (float)y); } \
  MSL_H2(n, half2, float2) \
  MSL_H2(n, half3, float3) \
  MSL_H2(n, half4, float4)
#define MSL_E(n) __builtin_elementwise_##n
#define MSL_MATH \
  MSL_F1(sqrt, MSL_E(sqrt)(x)) \
  MSL_F1(rsqrt, 1.0f / MSL_E(sqrt)(x)) \
  MSL_F1(exp, MSL_E(exp)(x)) \
  MSL_F1(exp2, MSL_E(exp2)(x)) \
  MSL_F1(exp10, MSL_E(exp10)(x)) \
  MSL_F1(log, MSL_E(log)(x)) \
  MSL_F1(log2, MSL_E(log2)(x)) \
  MSL_F1(log10, MSL_E(log10)(x)) \
  MSL_F1(sin, MSL_E(sin)(x)) \
  MSL_F1(cos, MSL_E(cos)(x)) \
  MSL_F1(tan, MSL_E(tan)(x)) \
  MSL_F1(asin, MSL_E(asin)(x)) \
  MSL_F1(acos, MSL_E(acos)(x)) \
  MSL_F1(atan, MSL_E(atan)(x)) \
  MSL_F1(sinh, MSL_E(sinh)(x)) \
  MSL_F1(cosh, MSL_E(cosh)(x)) \
  MSL_F1(tanh, MSL_E(tanh)(x)) \
  MSL_S1(acosh, ::acoshf(x)) \
  MSL_S1(asinh, ::asinhf(x)) \
  MSL_S1(atanh, ::atanhf(x)) \
  MSL_F2(atan2, MSL_E(atan2)(x, y)) \
  MSL_F2(pow, MSL_E(pow)(x, y)) \
  MSL_F2(powr, MSL_E(pow)(x, y)) \
  MSL_F2(fmod, MSL_E(fmod)(x, y)) \
  MSL_F2(divide, x / y)
MSL_MATH
namespace precise {
MSL_MATH
}
namespace fast {
MSL_MATH
}
MSL_F1(floor, MSL_E(floor)(x))
MSL_F1(ceil, MSL_E(ceil)(x))
MSL_F1(trunc, MSL_E(trunc)(x))
MSL_F1(round, MSL_E(round)(x))
MSL_F1(rint, MSL_E(nearbyint)(x))
MSL_F1(fabs, MSL_E(abs)(x))
MSL_F1(fract, x - MSL_E(floor)(x))
MSL_S1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f)
MSL_S1(saturate, x != x ? 0.0f : x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x)
MSL_F2(fmax, MSL_E(max)(x, y))
MSL_F2(fmin, MSL_E(min)(x, y))
MSL_F2(copysign, MSL_E(copysign)(x, y))
MSL_INL float fdim(float x, float y) { return x > y ? x - y : x != x ? x : y != y ? y : 0.0f; }
#define MSL_STEP(T) \
  MSL_INL T step(T e, T x) { \
    T r; \
    for (int i = 0; i < msl_vt<T>::n; i++) r[i] = x[i] < e[i] ? 0 : 1; \
    return r; \
  }
MSL_INL float step(float e, float x) { return x < e ? 0.0f : 1.0f; }
MSL_INL half step(half e, half x) { return x < e ? half(0) : half(1); }
MSL_STEP(float2)
MSL_STEP(float3)
MSL_STEP(float4)
MSL_STEP(half2)
MSL_STEP(half3)
MSL_STEP(half4)
MSL_S1(sinpi, ::metal::sin(x * 3.14159265358979f))
MSL_S1(cospi, ::metal::cos(x * 3.14159265358979f))
MSL_S1(tanpi, ::metal::tan(x * 3.14159265358979f))
MSL_INL float ldexp(float x, int e) { return ::ldexpf(x, e); }
MSL_INL half ldexp(half x, int e) { return (half)::ldexpf(x, e); }
MSL_INL float frexp(float x, MSL_T int& e) { return ::frexpf(x, &e); }
MSL_INL int ilogb(float x) { return ::ilogbf(x); }
MSL_INL float nextafter(float x, float y) { return ::nextafterf(x, y); }
MSL_INL float sincos(float x, MSL_T float& c) {
  c = cos(x);
  return sin(x);
}
MSL_INL float modf(float x, MSL_T float& i) {
  i = trunc(x);
  return copysign(x - i, x);
}
#define MSL_FMA(T) \
  MSL_INL T fma(T a, T b, T c) { return MSL_E(fma)(a, b, c); }
MSL_FMA(float)
MSL_FMA(float2)
MSL_FMA(float3)
MSL_FMA(float4)
MSL_INL half fma(half a, half b, half c) { return ::msl_fma_half(a, b, c); }
#define MSL_FMAH(N) \
  MSL_INL half##N fma(half##N a, half##N b, half##N c) { \
    half##N r; \
    for (int i = 0; i < N; i++) r[i] = ::msl_fma_half(a[i], b[i], c[i]); \
    return r; \
  }
MSL_FMAH(2)
MSL_FMAH(3)
MSL_FMAH(4)
#define MSL_FP(X) X(float) X(float2) X(float3) X(float4) X(half) X(half2) X(half3) X(half4)
#define MSL_IV(X, t) X(t) X(t##2) X(t##3) X(t##4)
#define MSL_INT(X) \
  MSL_IV(X, char) \
  MSL_IV(X, uchar) \
  MSL_IV(X, short) \
  MSL_IV(X, ushort) \
  MSL_IV(X, int) \
  MSL_IV(X, uint) \
  MSL_IV(X, long) \
  MSL_IV(X, ulong)
#define MSL_SINT(X) \
  MSL_IV(X, char) \
  MSL_IV(X, short) \
  MSL_IV(X, int) \
  MSL_IV(X, long)
#define MSL_UINT(X) \
  MSL_IV(X, uchar) \
  MSL_IV(X, ushort) \
  MSL_IV(X, uint) \
  MSL_IV(X, ulong)
#define MSL_MM(T) \
  MSL_INL T max(T x, T y) { return MSL_E(max)(x, y); } \
  MSL_INL T min(T x, T y) { return MSL_E(min)(x, y); } \
  MSL_INL T clamp(T x, T lo, T hi) { return MSL_E(min)(MSL_E(max)(x, lo), hi); } \
  MSL_INL T max3(T x, T y, T z) { return max(max(x, y), z); } \
  MSL_INL T min3(T x, T y, T z) { return min(min(x, y), z); }
MSL_INT(MSL_MM)
MSL_FP(MSL_MM)
namespace fast {
using metal::ceil;
using metal::clamp;
using metal::fabs;
using metal::floor;
using metal::fma;
using metal::fmax;
using metal::fmin;
using metal::max;
using metal::min;
using metal::rint;
using metal::round;
using metal::trunc;
}  // namespace fast
namespace precise {
using metal::ceil;
using metal::clamp;
using metal::fabs;
using metal::floor;
using metal::fma;
using metal::fmax;
using metal::fmin;
using metal::max;
using metal::min;
using metal::rint;
using metal::round;
using metal::trunc;
}  // namespace precise
#define MSL_ABS(T) \
  MSL_INL T abs(T x) { return MSL_E(abs)(x); }
MSL_SINT(MSL_ABS)
MSL_FP(MSL_ABS)
#define MSL_UABS(T) \
  MSL_INL T abs(T x) { return x; }
MSL_UINT(MSL_UABS)
#define MSL_MIX(T) \
  MSL_INL T mix(T x, T y, T a) { return x + (y - x) * a; }
MSL_FP(MSL_MIX)
}  // namespace metal
