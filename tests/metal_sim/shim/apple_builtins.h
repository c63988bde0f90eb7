// Builtins of Apple's compiler that MLX's headers call directly.
#pragma once

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2
#define MSL_B1(n) \
  MSL_INL float __metal_##n(float x, int) { return metal::n(x); }
#define MSL_B2(n) \
  MSL_INL float __metal_##n(float x, float y, int) { return metal::n(x, y); }
MSL_B1(fabs)
MSL_B1(acos)
MSL_B1(acosh)
MSL_B1(asin)
MSL_B1(asinh)
MSL_B1(atan)
MSL_B1(atanh)
MSL_B1(ceil)
MSL_B1(cos)
MSL_B1(cosh)
MSL_B1(cospi)
MSL_B1(exp)
MSL_B1(exp10)
MSL_B1(exp2)
MSL_B1(floor)
MSL_B1(fract)
MSL_B1(log)
MSL_B1(log10)
MSL_B1(log2)
MSL_B1(rint)
MSL_B1(round)
MSL_B1(rsqrt)
MSL_B1(sin)
MSL_B1(sinh)
MSL_B1(sinpi)
MSL_B1(sqrt)
MSL_B1(tan)
MSL_B1(tanh)
MSL_B1(tanpi)
MSL_B1(trunc)
MSL_B2(atan2)
MSL_B2(divide)
MSL_B2(fmax)
MSL_B2(fmin)
MSL_B2(fmod)
MSL_B2(pow)
MSL_B2(powr)
MSL_INL float __metal_fma(float x, float y, float z) { return metal::fma(x, y, z); }
MSL_INL float __metal_ldexp(float x, int k, int) { return metal::ldexp(x, k); }
MSL_INL float __metal_frexp(float x, MSL_T int* e) { return ::frexpf(x, e); }
MSL_INL float __metal_nextafter(float x, float y) { return ::nextafterf(x, y); }
MSL_INL float __metal_fmax3(float x, float y, float z, int) { return metal::max3(x, y, z); }
MSL_INL float __metal_fmin3(float x, float y, float z, int) { return metal::min3(x, y, z); }
MSL_INL float __metal_fmedian3(float x, float y, float z, int) {
  return metal::max(metal::min(x, y), metal::min(metal::max(x, y), z));
}
#define MSL_BS2(n) \
  template <class T> \
  MSL_INL T __metal_simd_##n(T v, ushort a, MSL_SITE) { \
    return metal::simd_##n(v, a, _l, _c); \
  }
MSL_BS2(broadcast)
MSL_BS2(shuffle)
MSL_BS2(shuffle_down)
MSL_BS2(shuffle_up)
MSL_BS2(shuffle_xor)
MSL_BS2(shuffle_rotate_up)
MSL_BS2(shuffle_rotate_down)
template <class T>
MSL_INL T __metal_simd_shuffle_and_fill_up(T v, T f, ushort d, ushort m, MSL_SITE) {
  return metal::simd_shuffle_and_fill_up(v, f, d, m, _l, _c);
}
template <class T>
MSL_INL T __metal_simd_shuffle_and_fill_down(T v, T f, ushort d, ushort m, MSL_SITE) {
  return metal::simd_shuffle_and_fill_down(v, f, d, m, _l, _c);
}
#define MSL_BR(n) \
  template <class T> \
  MSL_INL T __metal_simd_##n(T v, MSL_SITE) { \
    return metal::simd_##n(v, _l, _c); \
  }
MSL_BR(max)
MSL_BR(min)
MSL_BR(sum)
MSL_BR(product)
MSL_BR(xor)
MSL_BR(prefix_inclusive_sum)
MSL_BR(prefix_exclusive_sum)
MSL_BR(prefix_inclusive_product)
MSL_BR(prefix_exclusive_product)
MSL_INL ushort __metal_get_simdgroup_size(ushort) { return 32; }
MSL_INL ushort __metal_get_thread_index_in_simdgroup(ushort, MSL_SITE) {
  uint o = 0;
  ::msl_lane_index(&o);
  return ushort(o);
}
