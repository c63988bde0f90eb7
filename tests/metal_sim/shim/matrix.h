#pragma once

namespace metal {
// ---- simdgroup_matrix: lane l holds row ((l/4)&4)+((l/2)%4), columns ((l/4)&2)*2+(l%2)*2 + {0, 1}
template <class T, int C, int R>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8x8");
  vec<T, 2> e;
  MSL_INL simdgroup_matrix() MSL_T {}
  MSL_INL explicit simdgroup_matrix(T d) MSL_T;
  MSL_INL MSL_T vec<T, 2>& thread_elements() MSL_T { return e; }
  MSL_INL const MSL_T vec<T, 2>& thread_elements() const MSL_T { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
MSL_INL uint msl_lane(uint site) {
  uint o = 0;
  ::msl_simd(MSL_OP_MATRIX_LANE, MSL_UINT, 1, 4, &o, &o, 0, site);
  return o;
}
MSL_INL uint msl_row(uint l) { return ((l / 4) & 4) + ((l / 2) % 4); }
MSL_INL uint msl_col(uint l) { return ((l / 4) & 2) * 2 + (l % 2) * 2; }
template <class T, int C, int R>
MSL_INL simdgroup_matrix<T, C, R>::simdgroup_matrix(T d) MSL_T {
  uint l = msl_lane(0);
  for (uint i = 0; i < 2; i++) e[i] = msl_row(l) == msl_col(l) + i ? d : T(0);
}
template <class T, int C, int R>
MSL_INL simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, C, R> m;
  m.e = v;
  return m;
}
template <class T, int C, int R>
MSL_INL simdgroup_matrix<T, C, R> make_diagonal_simdgroup_matrix(T v) {
  return simdgroup_matrix<T, C, R>(v);
}
#define MSL_LS(AS) \
  template <class T, int C, int R> \
  MSL_INL void simdgroup_load(MSL_T simdgroup_matrix<T, C, R>& m, const AS T* p, ulong epr = C, \
                              ulong2 o = 0, bool tr = false, MSL_SITE) { \
    uint l = msl_lane(MSL_AT); \
    ulong r = msl_row(l), c = msl_col(l); \
    for (ulong i = 0; i < 2; i++) \
      m.e[i] = tr ? p[(o.y + c + i) * epr + o.x + r] : p[(o.y + r) * epr + o.x + c + i]; \
  }
#define MSL_ST(AS) \
  template <class T, int C, int R> \
  MSL_INL void simdgroup_store(simdgroup_matrix<T, C, R> m, AS T* p, ulong epr = C, ulong2 o = 0, \
                               bool tr = false, MSL_SITE) { \
    uint l = msl_lane(MSL_AT); \
    ulong r = msl_row(l), c = msl_col(l); \
    for (ulong i = 0; i < 2; i++) \
      (tr ? p[(o.y + c + i) * epr + o.x + r] : p[(o.y + r) * epr + o.x + c + i]) = m.e[i]; \
  }
MSL_LS(MSL_D)
MSL_LS(MSL_G)
MSL_LS(MSL_C)
MSL_ST(MSL_D)
MSL_ST(MSL_G)
template <class D, class A, class B, class Cc>
MSL_INL void simdgroup_multiply_accumulate(MSL_T simdgroup_matrix<D, 8, 8>& d,
                                           simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                                           simdgroup_matrix<Cc, 8, 8> c, MSL_SITE) {
  struct {
    float a[2], b[2], c[2];
  } in = {{(float)a.e[0], (float)a.e[1]},
          {(float)b.e[0], (float)b.e[1]},
          {(float)c.e[0], (float)c.e[1]}};
  struct {
    float d[2];
  } o;
  ::msl_simd(MSL_OP_MATRIX_MULTIPLY, MSL_FLOAT, 2, 24, &in, &o, 0, MSL_AT);
  d.e[0] = D(o.d[0]);
  d.e[1] = D(o.d[1]);
}
template <class D, class A, class B>
MSL_INL void simdgroup_multiply(MSL_T simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                simdgroup_matrix<B, 8, 8> b, MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), _l, _c);
}
template <class T>
MSL_INL simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a,
                                            simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b, 0, 0);
  return d;
}

}  // namespace metal
