// Relational, geometric and small library pieces.
#pragma once

namespace metal {
// ---- relational (comparisons of vectors give integer vectors here, not bool vectors)
#define MSL_REL(T) \
  MSL_INL bool isnan(T x) { return x != x; } \
  MSL_INL bool isinf(T x) { \
    return x == numeric_limits<T>::infinity() || x == -numeric_limits<T>::infinity(); \
  } \
  MSL_INL bool isfinite(T x) { return !isnan(x) && !isinf(x); } \
  MSL_INL bool signbit(T x) { return __builtin_signbitf((float)x); } \
  MSL_INL bool isnormal(T x) { return isfinite(x) && abs(x) >= numeric_limits<T>::min(); }
MSL_REL(float)
MSL_REL(half)
template <class V>
MSL_INL enable_if_t<(msl_vt<V>::n > 1), bool> any(V v) {
  for (int i = 0; i < msl_vt<V>::n; i++)
    if (v[i]) return true;
  return false;
}
template <class V>
MSL_INL enable_if_t<(msl_vt<V>::n > 1), bool> all(V v) {
  for (int i = 0; i < msl_vt<V>::n; i++)
    if (!v[i]) return false;
  return true;
}
MSL_INL bool any(bool v) { return v; }
MSL_INL bool all(bool v) { return v; }
template <class T>
struct msl_same {
  typedef T type;
};
template <class T>
MSL_INL enable_if_t<msl_vt<T>::n == 1, T> select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, class C>
MSL_INL enable_if_t<(msl_vt<T>::n > 1), T> select(T a, T b, C c) {
  T r = a;
  for (int i = 0; i < msl_vt<T>::n; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
// ---- geometric
template <class V>
MSL_INL enable_if_t<(msl_vt<V>::n > 1), typename msl_vt<V>::e> dot(V a, V b) {
  typename msl_vt<V>::e s = a[0] * b[0];
  for (int i = 1; i < msl_vt<V>::n; i++) s += a[i] * b[i];
  return s;
}
template <class V>
MSL_INL typename msl_vt<V>::e length_squared(V a) {
  return dot(a, a);
}
template <class V>
MSL_INL typename msl_vt<V>::e length(V a) {
  return sqrt(dot(a, a));
}
template <class V>
MSL_INL V normalize(V a) {
  return a * rsqrt(dot(a, a));
}
// ---- pack
MSL_INL float4 unpack_unorm4x8_to_float(uint x) {
  return float4{float(x & 255), float(x >> 8 & 255), float(x >> 16 & 255), float(x >> 24)} / 255.0f;
}
template <class T, size_t N>
struct array {
  T __v[N];
  MSL_INL constexpr size_t size() const { return N; }
  MSL_INL constexpr MSL_T T& operator[](size_t i) MSL_T { return __v[i]; }
  MSL_INL constexpr const MSL_T T& operator[](size_t i) const MSL_T { return __v[i]; }
  MSL_INL const MSL_C T& operator[](size_t i) const MSL_C { return __v[i]; }
};
template <class T>
using uniform = T;
template <class T>
MSL_INL T make_uniform(T x) {
  return x;
}

}  // namespace metal
