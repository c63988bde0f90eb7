#pragma once

namespace metal {
template <class T>
struct atomic {
  T __v;
};
template <class T>
using _atomic = atomic<T>;
#define MSL_AT_T(AS) \
  template <class T> \
  MSL_INL ulong msl_at(int op, volatile AS atomic<T>* p, T v, T e, uint site) { \
    ulong a = 0, b = 0; \
    if constexpr (sizeof(T) == 8) { \
      a = as_type<ulong>(v); \
      b = as_type<ulong>(e); \
    } else { \
      a = as_type<uint>(v); \
      b = as_type<uint>(e); \
    } \
    return ::msl_atomic(op, msl_code<T>::v, (ulong)p, a, b, site); \
  } \
  template <class T> \
  MSL_INL T msl_rmw(int op, volatile AS atomic<T>* p, T v, uint site) { \
    ulong r = msl_at(op, p, v, T(0), site); \
    if constexpr (sizeof(T) == 8) \
      return as_type<T>(r); \
    else \
      return as_type<T>(uint(r)); \
  } \
  template <class T> \
  MSL_INL T atomic_load_explicit(const volatile AS atomic<T>* p, memory_order, MSL_SITE) { \
    return msl_rmw(MSL_ATOMIC_LOAD, (volatile AS atomic<T>*)p, T(0), MSL_AT); \
  } \
  template <class T> \
  MSL_INL void atomic_store_explicit(volatile AS atomic<T>* p, typename msl_same<T>::type v, \
                                     memory_order, MSL_SITE) { \
    msl_rmw(MSL_ATOMIC_EXCHANGE, p, v, MSL_AT); \
  } \
  template <class T> \
  MSL_INL bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>* p, __generic T* e, \
                                                     typename msl_same<T>::type v, memory_order, \
                                                     memory_order, MSL_SITE) { \
    ulong r = msl_at(MSL_ATOMIC_COMPARE_EXCHANGE, p, v, *e, MSL_AT); \
    T o; \
    if constexpr (sizeof(T) == 8) \
      o = as_type<T>(r); \
    else \
      o = as_type<T>(uint(r)); \
    bool ok = __builtin_memcmp(&o, e, sizeof(T)) == 0; \
    *e = o; \
    return ok; \
  }
#define MSL_AT_OP(n, op, AS) \
  template <class T> \
  MSL_INL T atomic_##n##_explicit(volatile AS atomic<T>* p, typename msl_same<T>::type v, \
                                  memory_order, MSL_SITE) { \
    return msl_rmw(op, p, v, MSL_AT); \
  }
#define MSL_AT_ALL(AS) \
  MSL_AT_T(AS) \
  MSL_AT_OP(exchange, MSL_ATOMIC_EXCHANGE, AS) \
  MSL_AT_OP(fetch_add, MSL_ATOMIC_ADD, AS) \
  MSL_AT_OP(fetch_sub, MSL_ATOMIC_SUB, AS) \
  MSL_AT_OP(fetch_min, MSL_ATOMIC_MIN, AS) \
  MSL_AT_OP(fetch_max, MSL_ATOMIC_MAX, AS) \
  MSL_AT_OP(fetch_and, MSL_ATOMIC_AND, AS) \
  MSL_AT_OP(fetch_or, MSL_ATOMIC_OR, AS) \
  MSL_AT_OP(fetch_xor, MSL_ATOMIC_XOR, AS)
MSL_AT_ALL(MSL_D)
MSL_AT_ALL(MSL_G)
// (rewrite.py renames atomic_uint and friends: clang predefines the OpenCL ones)
typedef atomic<int> atomic_int_msl_;
typedef atomic<uint> atomic_uint_msl_;
typedef atomic<ulong> atomic_ulong_msl_;
typedef atomic<float> atomic_float_msl_;
typedef atomic<uint> atomic_bool;
}  // namespace metal
