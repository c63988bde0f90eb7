// Fibers, and the rendezvous at simd operations and barriers.
#pragma once

#include "simd_ops.h"

static void push(F* f) {
  f->st = READY;
  ready[nready++] = f;
}
static F* pop() {
  if (!nready) {
    return nullptr;
  }
  if (J->order == ORDER_RANDOM) {
    rng = rng * 6364136223846793005ull + 1442695040888963407ull;
    u32 i = (rng >> 33) % nready;
    F* t = ready[i];
    ready[i] = ready[nready - 1];
    ready[nready - 1] = t;
  }
  return ready[--nready];
}
static inline void block() {
  n_switch++;
  F* me = cur;
  F* nx = pop();
  if (nx == me) {
    return;
  }
  void* to = sched_sp;
  if (nx) {
    cur = nx;
    stk_lo = (uptr)stacks + nx->tid * STK + 4096;
    stk_hi = (uptr)stacks + (nx->tid + 1) * STK;
    to = nx->sp;
  } else {
    cur = nullptr;
  }
  msl_switch(&me->sp, to);
}
static void entry() {
  J->fn(J->args, &cur->ids);
  cur->st = DONE;
  nlive--;
  block();
  abort();
}

// release a set of fibers, so that pop() honours the order policy
static void release(F** l, u32 n) {
  if (J->order == ORDER_REVERSE) {
    for (u32 i = 0; i < n; i++) {
      push(l[i]);
    }
  } else {
    for (u32 i = n; i--;) {
      push(l[i]);
    }
  }
}

static void describe(char* b, size_t n, F* f) {
  char w[100];
  where(w, sizeof w, f->tid);
  const char* k = f->st == DONE ? "has exited"
      : f->st == BAR            ? "waits at threadgroup_barrier"
      : f->st == SIMD           ? "waits at a simd operation"
                                : "ready";
  if (f->st == DONE) {
    snprintf(b, n, "\n    %s %s", w, k);
  } else {
    snprintf(b, n, "\n    %s %s, line %u (@pc%lx)", w, k, f->site >> 10, (long)(f->pc - lib_base));
  }
}
__attribute__((noreturn)) static void diverged(const char* what, F** l, u32 n) {
  char m[2500];
  int k = snprintf(m, sizeof m, "%s", what);
  u32 shown = 0;
  F* last = nullptr;
  for (u32 i = 0; i < n && shown < 8; i++) {
    if (l[i] && (!last || last->st != l[i]->st || last->site != l[i]->site)) {
      char b[400];
      describe(b, sizeof b, l[i]);
      k += snprintf(m + k, sizeof m - k, "%s", b);
      shown++;
      last = l[i];
    }
  }
  cur = nullptr;
  fail(0, "%s", m);
}
static inline bool same_place(F* a, F* b) {
  return a->st == b->st && a->site == b->site && a->op == b->op && a->type == b->type && a->pc == b->pc;
}
// a full simdgroup (or quad) has arrived
static void complete_lanes(u32 first, u32 n) {
  F* L[32];
  for (u32 i = 0; i < n; i++) {
    L[i] = &fib[first + i];
    if (!same_place(L[i], L[0])) {
      for (u32 k = 0; k < n; k++) {
        L[k] = &fib[first + k];
      }
      diverged("divergence: lanes of one simdgroup wait at different simd operations", L, n);
    }
  }
  perform(L, n == 32 ? 0xffffffffu : (1u << n) - 1, n);
  if (L[0]->op == MSL_OP_BARRIER && L[0]->arg) {
    sep[L[0]->sg]++;
  }
  release(L, n);
}
static void complete_barrier() {
  F* l[MAXT];
  u32 n = 0;
  for (u32 i = 0; i < nthreads; i++) {
    if (fib[i].st == BAR) {
      l[n++] = &fib[i];
    }
  }
  for (u32 i = 1; i < n; i++) {
    if (!same_place(l[i], l[0]) || l[i]->arg != l[0]->arg) {
      diverged("divergence: threads of one threadgroup wait at different threadgroup_barrier calls", l, n);
    }
  }
  if (l[0]->arg & 2) {
    tg_stamp++;
  }
  if (l[0]->arg & 1) {
    dev_stamp++;
  }
  n_barriers++;
  nbar = 0;
  release(l, n);
}
// nothing is runnable, but threads are left
static void resolve() {
  F* all[MAXT];
  for (u32 i = 0; i < nthreads; i++) {
    all[i] = &fib[i];
  }
  if (!J->tolerant) {
    diverged(
        nbar ? "divergence: threadgroup_barrier reached by only some threads"
             : "divergence: simd operation reached by only some lanes",
        all, nthreads);
  }
  bool any = false;
  for (u32 g = 0; g * 32 < nthreads; g++) {  // simd operations run with the lanes that are there
    u32 n = nthreads - g * 32 < 32 ? nthreads - g * 32 : 32;
    u32 done = 0;
    for (u32 i = 0; i < n; i++) {
      F* a = &fib[g * 32 + i];
      if (a->st != SIMD || (done >> i & 1)) {
        continue;
      }
      F* L[32] = {};
      F* r[32];
      u32 m = 0, k = 0;
      for (u32 j = i; j < n; j++) {
        F* b = &fib[g * 32 + j];
        if (same_place(a, b) && !(a->op >= MSL_OP_QUAD && (i ^ j) >> 2)) {
          L[j] = b;
          m |= 1u << j;
          r[k++] = b;
        }
      }
      done |= m;
      F* LL[32];
      u32 base = a->op >= MSL_OP_QUAD ? i & ~3u : 0, w = a->op >= MSL_OP_QUAD ? 4 : n;
      for (u32 j = 0; j < w && base + j < 32; j++) {
        LL[j] = L[base + j];
      }
      perform(LL, m >> base, w);
      if (a->op == MSL_OP_BARRIER && a->arg) {
        sep[g]++;
      }
      if (a->op >= MSL_OP_QUAD) {
        qwait[(g * 32 + i) / 4] -= k;
      } else {
        sgwait[g] -= k;
      }
      release(r, k);
      any = true;
    }
  }
  if (!any && nbar && nbar == nlive) {
    complete_barrier();
    any = true;
  }
  if (!any) {
    diverged("divergence: threads can not make progress", all, nthreads);
  }
}

X void msl_simd(int op, int type, int ncomp, int size, const void* in, void* out, u32 arg, u32 site) {
  F* f = cur;
  f->op = op;
  f->type = type;
  f->ncomp = ncomp;
  f->size = size;
  f->in = in;
  f->out = out;
  f->arg = arg;
  f->site = site;
  f->pc = PC;
  f->st = SIMD;
  if (op >= MSL_OP_QUAD) {
    u32 q = f->tid / 4, n = nthreads - q * 4 < 4 ? nthreads - q * 4 : 4;
    if (++qwait[q] == n) {
      qwait[q] = 0;
      complete_lanes(q * 4, n);
    }
  } else if (++sgwait[f->sg] == sgcnt[f->sg]) {
    sgwait[f->sg] = 0;
    complete_lanes(f->sg * 32, sgcnt[f->sg]);
  }
  block();
}
X void msl_lane_index(u32* o) {
  *o = cur->lane;
}
X void msl_barrier(int flags, u32 site) {
  F* f = cur;
  f->st = BAR;
  f->arg = flags;
  f->site = site;
  f->op = f->type = 0;
  f->pc = PC;
  if (++nbar == nthreads) {
    complete_barrier();
  }
  block();
}
