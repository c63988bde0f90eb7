// Atomics: sequentially consistent, and checked like any other access but for races.
#pragma once

#include "memory.h"

template <class T>
static u64 rmw(int op, T* p, T v, T e) {
  T o, nv;
  __atomic_load(p, &o, __ATOMIC_SEQ_CST);
  for (;;) {
    switch (op) {
      case MSL_ATOMIC_LOAD:
        nv = o;
        break;
      case MSL_ATOMIC_EXCHANGE:
        nv = v;
        break;
      case MSL_ATOMIC_ADD:
        nv = T(o + v);
        break;
      case MSL_ATOMIC_SUB:
        nv = T(o - v);
        break;
      case MSL_ATOMIC_MIN:
        nv = o < v ? o : v;
        break;
      case MSL_ATOMIC_MAX:
        nv = o < v ? v : o;
        break;
      case MSL_ATOMIC_COMPARE_EXCHANGE:
        nv = memcmp(&o, &e, sizeof(T)) ? o : v;
        break;
      default:
        if constexpr (__is_integral(T)) {
          nv = op == MSL_ATOMIC_AND ? o & v : op == MSL_ATOMIC_OR ? o | v : o ^ v;
        } else {
          nv = o;
        }
    }
    if (op == MSL_ATOMIC_LOAD || __atomic_compare_exchange(p, &o, &nv, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
      break;
    }
  }
  u64 r = 0;
  memcpy(&r, &o, sizeof(T));
  return r;
}

template <class T>
static u64 rmwc(int op, u64 a, u64 v, u64 e) {
  T x, y;
  memcpy(&x, &v, sizeof(T));
  memcpy(&y, &e, sizeof(T));
  return rmw<T>(op, (T*)a, x, y);
}

X u64 msl_atomic(int op, int type, u64 a, u64 v, u64 e, u32) {
  u32 n = type >= MSL_LONG ? 8 : 4;
  aligned(a, n, PC);
  access_slow(a, n, op != MSL_ATOMIC_LOAD, PC, true);
  switch (type) {
    case MSL_FLOAT:
      return rmwc<float>(op, a, v, e);
    case MSL_INT:
      return rmwc<int32_t>(op, a, v, e);
    case MSL_UINT:
      return rmwc<u32>(op, a, v, e);
    case MSL_LONG:
      return rmwc<int64_t>(op, a, v, e);
    case MSL_ULONG:
      return rmwc<u64>(op, a, v, e);
  }
  fail(PC, "atomic on an unsupported type");
}
