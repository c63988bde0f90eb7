// What rewrite.py and compiler.py write calls to.
#pragma once

// `S s = expr;` for a struct S is rewritten to `S s = msl_ld(expr);`: struct copies out of
// `constant` memory
template <class T>
MSL_INL T msl_ld(const T& x) {
  return x;
}
template <class T>
MSL_INL T msl_ld(const MSL_C T& x) {
  return *(const MSL_D T*)(ulong)&x;
}
// static_cast<half/bfloat>(x): Metal converts between half and bfloat explicitly, clang not at all
template <class To, class A>
MSL_INL constexpr To msl_num(A a) {
  if constexpr (sizeof(To) == sizeof(A) && metal::is_floating_point_v<A> &&
                !metal::is_same_v<To, A>)
    return To((float)a);
  else
    return static_cast<To>(a);
}
// `(float4)x` is rewritten to `msl_cast<float4>{} ->* x`
template <class V>
struct msl_cast {};
template <class V, class A>
MSL_INL V operator->*(msl_cast<V>, A a) {
  return msl_mk<V>(a);
}

// ---- entry points: msl_k<i>(argument words, thread ids) written by compiler.py call kernels
// through these
struct msl_ids {
  uint tpig[3], tgpig[3], tpitg[3], tptg[3], dtptg[3], tgpg[3], tpg[3], tiitg[3], lane[3], sg[3],
      sgptg[3], qlane[3], qg[3], qgptg[3], tps[3], zero[3];
};
template <class F>
struct msl_sig;
template <class R, class... A>
struct msl_sig<R(A...)> {
  static constexpr MSL_C int n = sizeof...(A);
  template <int I>
  using at = __type_pack_element<I, A...>;
};
template <class P>
struct msl_barg;
template <class T>
struct msl_barg<T*> {
  static MSL_INL T* get(ulong p) { return (T*)p; }
};
template <class T>
struct msl_barg<T* const> : msl_barg<T*> {};
template <class T>
struct msl_barg<T&> {
  static __attribute__((always_inline, no_sanitize("undefined"))) T& get(ulong p) { return *(T*)p; }
};
template <class T>
MSL_INL T msl_idarg(MSL_D const uint* p) {
  typedef metal::remove_cv_t<T> V;
  if constexpr (msl_vt<V>::n == 1)
    return V(p[0]);
  else {
    V v;
    for (int i = 0; i < msl_vt<V>::n; i++) v[i] = p[i];
    return v;
  }
}
