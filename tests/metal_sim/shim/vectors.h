// Vectors are clang ext_vectors, as in Apple's compiler.
#pragma once

#include "base.h"

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}
#define MSL_V(T, n) \
  typedef metal::vec<T, 2> n##2; \
  typedef metal::vec<T, 3> n##3; \
  typedef metal::vec<T, 4> n##4;
MSL_V(char, char)
MSL_V(uchar, uchar)
MSL_V(short, short)
MSL_V(ushort, ushort)
MSL_V(int, int)
MSL_V(uint, uint)
MSL_V(long, long)
MSL_V(ulong, ulong)
MSL_V(half, half)
MSL_V(float, float)
MSL_V(bfloat, bfloat)
typedef int2 bool2;
typedef int3 bool3;
typedef int4 bool4;  // clang has no bool ext_vector in this mode

// ---- vector traits and construction: rewrite.py turns `float4(a, b)` into `msl_mk<float4>(a, b)`
template <class V>
struct msl_vt {
  static constexpr MSL_C int n = 1;
  typedef V e;
};
template <class T, int N>
struct msl_vt<T __attribute__((ext_vector_type(N)))> {
  static constexpr MSL_C int n = N;
  typedef T e;
};
template <class V>
struct msl_vt<const V> : msl_vt<V> {};
template <class V, class A>
MSL_INL constexpr V msl_mk(A a) {
  if constexpr (msl_vt<A>::n == 1)
    return V(static_cast<typename msl_vt<V>::e>(a));
  else {
    static_assert(msl_vt<A>::n == msl_vt<V>::n, "vector constructor: component count");
    return __builtin_convertvector(a, V);
  }
}
template <class E, class V, class A>
MSL_INL void msl_put(V& v, int i, A a) {
  if constexpr (msl_vt<A>::n == 1)
    v[i] = static_cast<E>(a);
  else
    for (int k = 0; k < msl_vt<A>::n; k++) v[i + k] = a[k];
}
template <class V, class A, class B, class... R>
MSL_INL V msl_mk(A a, B b, R... r) {
  static_assert((msl_vt<A>::n + (msl_vt<B>::n + ... + msl_vt<R>::n)) == msl_vt<V>::n,
                "vector constructor: component count");
  V v = {};
  int i = msl_vt<A>::n;
  typedef typename msl_vt<V>::e E;
  msl_put<E>(v, 0, a);
  msl_put<E>(v, i, b);
  i += msl_vt<B>::n;
  ((msl_put<E>(v, i, r), i += msl_vt<R>::n), ...);
  return v;
}
template <class V>
MSL_INL constexpr V msl_mk() {
  return V(0);
}
template <class To, class From>
MSL_INL constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs equal sizes");
  return __builtin_bit_cast(To, x);
}

// ---- packed vectors: element-aligned; sizes 2 and 4 are ext_vectors with lower alignment
#define MSL_P(T, n) \
  typedef T packed_##n##2 __attribute__((ext_vector_type(2), aligned(sizeof(T)))); \
  typedef T packed_##n##4 __attribute__((ext_vector_type(4), aligned(sizeof(T)))); \
  typedef msl_packed3<T> packed_##n##3;
template <class T>
struct msl_packed3 {
  T x, y, z;
  typedef metal::vec<T, 3> V;
  msl_packed3() = default;
  msl_packed3(V v) : x(v.x), y(v.y), z(v.z) {}
  msl_packed3(T a, T b, T c) : x(a), y(b), z(c) {}
  operator V() const MSL_C { return V{x, y, z}; }
  operator V() const MSL_T { return V{x, y, z}; }
  void operator=(V v) MSL_T {
    x = v.x;
    y = v.y;
    z = v.z;
  }
};
MSL_P(char, char)
MSL_P(uchar, uchar)
MSL_P(short, short)
MSL_P(ushort, ushort)
MSL_P(int, int)
MSL_P(uint, uint)
MSL_P(half, half)
MSL_P(float, float)
MSL_P(bfloat, bfloat)
