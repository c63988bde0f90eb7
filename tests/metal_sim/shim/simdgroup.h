// Barriers, simdgroup and quadgroup functions.
#pragma once

namespace metal {
// ---- synchronisation
enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
MSL_INL constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
enum memory_order {
  memory_order_relaxed = 0,
  memory_order_acquire = 2,
  memory_order_release = 3,
  memory_order_acq_rel = 4,
  memory_order_seq_cst = 5
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device,
  thread_scope_system
};
enum memory_scope { memory_scope_simdgroup, memory_scope_threadgroup, memory_scope_device };
MSL_INL void threadgroup_barrier(mem_flags f, MSL_SITE) { ::msl_barrier(int(f), MSL_AT); }
MSL_INL void simdgroup_barrier(mem_flags f, MSL_SITE) {
  ::msl_simd(MSL_OP_BARRIER, 0, 0, 0, nullptr, nullptr, uint(f), MSL_AT);
}
MSL_INL void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

// ---- simdgroup and quadgroup functions
template <class T>
struct msl_code {
  static constexpr MSL_C int v = -1;  // no element type
};
#define MSL_TYPE(T, n) \
  template <> \
  struct msl_code<T> { \
    static constexpr MSL_C int v = n; \
  };
MSL_TYPE(float, MSL_FLOAT)
MSL_TYPE(half, MSL_HALF)
MSL_TYPE(bfloat, MSL_BFLOAT)
MSL_TYPE(char, MSL_CHAR)
MSL_TYPE(signed char, MSL_CHAR)
MSL_TYPE(uchar, MSL_UCHAR)
MSL_TYPE(short, MSL_SHORT)
MSL_TYPE(ushort, MSL_USHORT)
MSL_TYPE(int, MSL_INT)
MSL_TYPE(uint, MSL_UINT)
MSL_TYPE(long, MSL_LONG)
MSL_TYPE(ulong, MSL_ULONG)
MSL_TYPE(bool, MSL_UCHAR)
template <class T>
MSL_INL T msl_lanes(int op, T v, uint arg, uint site) {
  typedef typename msl_vt<T>::e E;
  static_assert(msl_code<E>::v >= 0, "simd function: scalar or vector type needed");
  T o;
  ::msl_simd(op, msl_code<E>::v, msl_vt<T>::n, sizeof(T), &v, &o, arg, site);
  return o;
}
#define MSL_SH(n, op, A) \
  template <class T> \
  MSL_INL T n(T v, A a, MSL_SITE) { \
    return msl_lanes(op, v, uint(a), MSL_AT); \
  }
MSL_SH(simd_shuffle, MSL_OP_SHUFFLE, ushort)
MSL_SH(simd_shuffle_xor, MSL_OP_SHUFFLE_XOR, ushort)
MSL_SH(simd_shuffle_up, MSL_OP_SHUFFLE_UP, ushort)
MSL_SH(simd_shuffle_down, MSL_OP_SHUFFLE_DOWN, ushort)
MSL_SH(simd_shuffle_rotate_up, MSL_OP_ROTATE_UP, ushort)
MSL_SH(simd_shuffle_rotate_down, MSL_OP_ROTATE_DOWN, ushort)
MSL_SH(simd_broadcast, MSL_OP_BROADCAST, ushort)
MSL_SH(quad_shuffle, MSL_OP_SHUFFLE + MSL_OP_QUAD, ushort)
MSL_SH(quad_shuffle_xor, MSL_OP_SHUFFLE_XOR + MSL_OP_QUAD, ushort)
MSL_SH(quad_shuffle_up, MSL_OP_SHUFFLE_UP + MSL_OP_QUAD, ushort)
MSL_SH(quad_shuffle_down, MSL_OP_SHUFFLE_DOWN + MSL_OP_QUAD, ushort)
MSL_SH(quad_shuffle_rotate_up, MSL_OP_ROTATE_UP + MSL_OP_QUAD, ushort)
MSL_SH(quad_shuffle_rotate_down, MSL_OP_ROTATE_DOWN + MSL_OP_QUAD, ushort)
MSL_SH(quad_broadcast, MSL_OP_BROADCAST + MSL_OP_QUAD, ushort)
#define MSL_FILL(n, op) \
  template <class T> \
  MSL_INL T n(T v, T fill, ushort d, ushort mod = 32, MSL_SITE) { \
    struct { \
      T a, b; \
    } in = {v, fill}; \
    T o; \
    typedef typename msl_vt<T>::e E; \
    ::msl_simd(op, msl_code<E>::v, mod, sizeof(T), &in, &o, d, MSL_AT); \
    return o; \
  }
MSL_FILL(simd_shuffle_and_fill_up, MSL_OP_FILL_UP)
MSL_FILL(simd_shuffle_and_fill_down, MSL_OP_FILL_DOWN)
#define MSL_RD(n, op) \
  template <class T> \
  MSL_INL T simd_##n(T v, MSL_SITE) { \
    return msl_lanes(op, v, 0, MSL_AT); \
  } \
  template <class T> \
  MSL_INL T quad_##n(T v, MSL_SITE) { \
    return msl_lanes(op + MSL_OP_QUAD, v, 0, MSL_AT); \
  }
MSL_RD(broadcast_first, MSL_OP_BROADCAST_FIRST)
MSL_RD(sum, MSL_OP_SUM)
MSL_RD(product, MSL_OP_PRODUCT)
MSL_RD(max, MSL_OP_MAX)
MSL_RD(min, MSL_OP_MIN)
MSL_RD(and, MSL_OP_AND)
MSL_RD(or, MSL_OP_OR)
MSL_RD(xor, MSL_OP_XOR)
MSL_RD(prefix_inclusive_sum, MSL_OP_PREFIX_INCLUSIVE_SUM)
MSL_RD(prefix_exclusive_sum, MSL_OP_PREFIX_EXCLUSIVE_SUM)
MSL_RD(prefix_inclusive_product, MSL_OP_PREFIX_INCLUSIVE_PRODUCT)
MSL_RD(prefix_exclusive_product, MSL_OP_PREFIX_EXCLUSIVE_PRODUCT)
struct simd_vote {
  typedef ulong vote_t;
  vote_t v;
  simd_vote() = default;
  MSL_INL explicit constexpr simd_vote(vote_t x) : v(x) {}
  MSL_INL explicit constexpr operator vote_t() const { return v; }
  MSL_INL bool all() const { return v == 0xffffffffu; }
  MSL_INL bool any() const { return v != 0; }
};
MSL_INL ulong msl_ballot(bool p, uint site) {
  uint i = p;
  ulong o;
  ::msl_simd(MSL_OP_BALLOT, MSL_UINT, 1, 4, &i, &o, 0, site);
  return o;
}
MSL_INL simd_vote simd_ballot(bool p, MSL_SITE) {
  return simd_vote(msl_ballot(p, MSL_AT) & 0xffffffffu);
}
MSL_INL simd_vote simd_active_threads_mask(MSL_SITE) {
  return simd_vote(msl_ballot(true, MSL_AT) >> 32);
}
MSL_INL bool simd_all(bool p, MSL_SITE) {
  ulong b = msl_ballot(p, MSL_AT);
  return uint(b) == uint(b >> 32);
}
MSL_INL bool simd_any(bool p, MSL_SITE) { return uint(msl_ballot(p, MSL_AT)) != 0; }
MSL_INL bool simd_is_first(MSL_SITE) {
  uint i = 0, o;
  ::msl_simd(MSL_OP_IS_FIRST, MSL_UINT, 1, 4, &i, &o, 0, MSL_AT);
  return o;
}

}  // namespace metal
