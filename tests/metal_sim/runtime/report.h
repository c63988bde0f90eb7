// The first broken rule ends the run; "@pc<hex>" becomes file:line in launch.py.
#pragma once

#include "state.h"

static void where(char* b, size_t n, u32 tid) {
  if (tid >= nthreads) {
    snprintf(b, n, "?");
    return;
  }
  Ids& d = fib[tid].ids;
  snprintf(b, n, "thread (%u,%u,%u) [simdgroup %u lane %u]", d.tpitg[0], d.tpitg[1], d.tpitg[2], d.sg[0], d.lane[0]);
}
__attribute__((noreturn, format(printf, 2, 3))) static void fail(uptr pc, const char* fmt, ...) {
  char m[3000], w[128];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(m, sizeof m, fmt, ap);
  va_end(ap);
  if (cur) {
    where(w, sizeof w, cur->tid);
  } else {
    snprintf(w, sizeof w, "scheduler");
  }
  int expect = 0;
  if (__atomic_compare_exchange_n((int*)J->err, &expect, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    int k = snprintf(
        J->err + 4, J->errsize - 4, "%s: %s\n  in threadgroup (%u,%u,%u), %s", J->kernel, m, gid[0], gid[1], gid[2], w);
    if (pc && k < (int)J->errsize - 64) {
      snprintf(J->err + 4 + k, J->errsize - 4 - k, ", at @pc%lx", (long)(pc - lib_base));
    }
  }
  _exit(3);
}
static void on_signal(int s, siginfo_t* si, void* uc) {
  uptr pc = ((ucontext_t*)uc)->uc_mcontext.gregs[REG_RIP], a = (uptr)si->si_addr;
  if (pc < lib_lo || pc >= lib_hi) {
    pc = 0;
  }
  if (s == SIGALRM) {
    fail(pc, "timeout after %u s (endless loop?)", J->timeout);
  }
  if (s == SIGSEGV && a >= (uptr)stacks && a < (uptr)stacks + nthreads * STK) {
    fail(pc, "thread stack overflow (> %zu KB of thread memory)", STK >> 10);
  }
  fail(
      pc, "signal %s, address %#lx",
      s == SIGSEGV      ? "SIGSEGV"
          : s == SIGFPE ? "SIGFPE"
          : s == SIGILL ? "SIGILL (trap: unreachable code or extract_bits range)"
                        : "?",
      a);
}
