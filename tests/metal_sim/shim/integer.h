// Integer functions.
#pragma once

namespace metal {
#define MSL_BITS(T) \
  MSL_INL T popcount(T x) { return MSL_E(popcount)(x); } \
  MSL_INL T reverse_bits(T x) { return MSL_E(bitreverse)(x); } \
  MSL_INL T addsat(T x, T y) { return MSL_E(add_sat)(x, y); } \
  MSL_INL T subsat(T x, T y) { return MSL_E(sub_sat)(x, y); }
MSL_INT(MSL_BITS)
#define MSL_SC(X) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong)
#define MSL_BS(T) \
  MSL_INL T clz(T x) { \
    constexpr int w = sizeof(T) * 8; \
    return x == 0 ? T(w) : T(__builtin_clzl((ulong(x) << (64 - w)))); \
  } \
  MSL_INL T ctz(T x) { return x == 0 ? T(sizeof(T) * 8) : T(__builtin_ctzl(ulong(x))); } \
  MSL_INL T rotate(T x, T n) { \
    typedef make_unsigned_t<T> U; \
    constexpr uint w = sizeof(T) * 8; \
    uint k = uint(n) & (w - 1); \
    return T(U(U(x) << k) | (k ? U(U(x) >> (w - k)) : U(0))); \
  } \
  MSL_INL T extract_bits(T x, uint o, uint b) { \
    constexpr uint w = sizeof(T) * 8; \
    typedef make_unsigned_t<T> U; \
    if (b == 0) return 0; \
    if (o + b > w) __builtin_trap(); \
    U s = U(U(x) << (w - o - b)); \
    return T(T(s) >> (w - b)); \
  } \
  MSL_INL T insert_bits(T x, T y, uint o, uint b) { \
    constexpr uint w = sizeof(T) * 8; \
    typedef make_unsigned_t<T> U; \
    if (b == 0) return x; \
    if (o + b > w) __builtin_trap(); \
    U m = U(U(U(~U(0)) >> (w - b)) << o); \
    return T((U(x) & U(~m)) | (U(U(y) << o) & m)); \
  } \
  MSL_INL make_unsigned_t<T> absdiff(T x, T y) { \
    typedef make_unsigned_t<T> U; \
    return x < y ? U(y) - U(x) : U(x) - U(y); \
  }
MSL_SC(MSL_BS)
MSL_INL uint mulhi(uint a, uint b) { return uint((ulong(a) * b) >> 32); }
MSL_INL int mulhi(int a, int b) { return int((long(a) * b) >> 32); }
MSL_INL ushort mulhi(ushort a, ushort b) { return ushort((uint(a) * b) >> 16); }
MSL_INL ulong mulhi(ulong a, ulong b) { return ulong(((unsigned __int128)a * b) >> 64); }
MSL_INL int mul24(int a, int b) { return int(uint(a) * uint(b)); }
MSL_INL uint mul24(uint a, uint b) { return a * b; }
MSL_INL int mad24(int a, int b, int c) { return int(uint(a) * uint(b) + uint(c)); }
MSL_INL uint mad24(uint a, uint b, uint c) { return a * b + c; }
}  // namespace metal
