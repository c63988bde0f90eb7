// Executes Metal threadgroups on the CPU: one fiber per thread, rendezvous for barriers and
// simdgroup operations, and checked memory: kernels are compiled with -fsanitize=thread,undefined
// and the callbacks are implemented here. One translation unit, so that the memory callbacks
// inline.
#include "atomics.h"
#include "schedule.h"
#include "undefined.h"

static int lib_range(dl_phdr_info* i, size_t, void* fn) {
  uptr lo = ~(uptr)0, hi = 0;
  for (int k = 0; k < i->dlpi_phnum; k++) {
    if (i->dlpi_phdr[k].p_type == PT_LOAD) {
      uptr s = i->dlpi_addr + i->dlpi_phdr[k].p_vaddr;
      if (s < lo) {
        lo = s;
      }
      if (s + i->dlpi_phdr[k].p_memsz > hi) {
        hi = s + i->dlpi_phdr[k].p_memsz;
      }
    }
  }
  if ((uptr)fn >= lo && (uptr)fn < hi) {
    lib_lo = lo;
    lib_hi = hi;
    lib_base = i->dlpi_addr;
    return 1;
  }
  return 0;
}

static void* shared(size_t n) {
  void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

// Thread t of a threadgroup of d threads, at position g of the grid.
static void start_thread(u32 t, const u32 g[3], const u32 d[3]) {
  F* f = &fib[t];
  f->tid = t;
  f->sg = t / 32;
  f->lane = t % 32;
  Ids& ids = f->ids;
  u32 p[3] = {t % d[0], t / d[0] % d[1], t / d[0] / d[1]};
  for (int k = 0; k < 3; k++) {
    ids.tpitg[k] = p[k];
    ids.tgpig[k] = g[k];
    ids.tpig[k] = g[k] * J->threads[k] + p[k];
    ids.tptg[k] = d[k];
    ids.dtptg[k] = J->threads[k];
    ids.tgpg[k] = J->grid[k];
    ids.tpg[k] = J->total[k];
  }
  ids.tiitg[0] = t;
  ids.lane[0] = t % 32;
  ids.sg[0] = t / 32;
  ids.sgptg[0] = (nthreads + 31) / 32;
  ids.qlane[0] = t % 4;
  ids.qg[0] = t / 4;
  ids.qgptg[0] = (nthreads + 3) / 4;
  ids.tps[0] = 32;
  u64* sp = (u64*)(stacks + (t + 1) * STK);
  *--sp = 0;
  *--sp = (u64)&entry;
  for (int k = 0; k < 6; k++) {
    *--sp = 0;  // the registers that msl_switch pops
  }
  f->sp = sp;
}

static void run_group(u64 number) {
  u32 g[3] = {u32(number % J->grid[0]), u32(number / J->grid[0] % J->grid[1]), u32(number / J->grid[0] / J->grid[1])};
  u32 d[3];
  for (int k = 0; k < 3; k++) {
    gid[k] = g[k];
    u32 rest = J->total[k] - g[k] * J->threads[k];
    d[k] = rest < J->threads[k] ? rest : J->threads[k];
  }
  nthreads = nlive = d[0] * d[1] * d[2];
  nbar = nready = 0;
  gseq = number + 1;
  tg_stamp = dev_stamp = gseq << 24;
  memset(sgwait, 0, sizeof sgwait);
  memset(qwait, 0, sizeof qwait);
  for (u32 i = 0; i < nvars; i++) {
    memset(arena + vars[i].off, 0xff, vars[i].size);
  }
  for (u32 s = 0; s * 32 < nthreads; s++) {
    sgcnt[s] = nthreads - s * 32 < 32 ? nthreads - s * 32 : 32;
  }
  F* all[MAXT];
  for (u32 t = 0; t < nthreads; t++) {
    start_thread(t, g, d);
    all[t] = &fib[t];
  }
  release(all, nthreads);
  n_threads += nthreads;
  while (nlive) {
    F* f = pop();
    if (!f) {
      resolve();
      continue;
    }
    cur = f;
    stk_lo = (uptr)stacks + f->tid * STK + 4096;
    msl_switch(&sched_sp, f->sp);
  }
  cur = nullptr;
}

static u8* mapped(size_t n) {
  return (u8*)mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void catch_signals() {
  stack_t ss = {};
  ss.ss_size = 65536;
  ss.ss_sp = malloc(ss.ss_size);
  sigaltstack(&ss, nullptr);
  struct sigaction sa = {};
  sa.sa_sigaction = on_signal;
  sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
  int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM};
  for (int s : signals) {
    sigaction(s, &sa, nullptr);
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  alarm(J->timeout);
}

static u64 gcd(u64 x, u64 y) {
  return y ? gcd(y, x % y) : x;
}

static void worker(u32 w) {
  u32 threads = J->threads[0] * J->threads[1] * J->threads[2];
  stacks = mapped(threads * STK);
  for (u32 i = 0; i < threads; i++) {
    mprotect(stacks + i * STK, 4096, PROT_NONE);
  }
  arena = mapped(ARENA);
  arena_sh = (Cell*)mapped(ARENA * sizeof(Cell));
  fib = (F*)calloc(MAXT, sizeof(F));
  nthreads = nvars = arena_used = tg_total = 0;
  cur = nullptr;
  rng = J->seed * 0x9E3779B97F4A7C15ull + w + 1;
  n_threads = n_switch = n_access = n_barriers = 0;
  memset(n_simd, 0, sizeof n_simd);
  catch_signals();
  for (u32 i = 0; i < J->ntgargs; i++) {
    J->args[J->tgargs[i].argpos] = (u64)arena + tg_place(0x80000000u + i, J->tgargs[i].bytes);
  }
  // Groups are visited as (step * i + start) mod n, with step and n coprime.
  u64 n = (u64)J->grid[0] * J->grid[1] * J->grid[2], step = 1, start = 0;
  if (J->order == ORDER_REVERSE) {
    step = start = n - 1;
  }
  if (J->order == ORDER_RANDOM) {
    step = (rng >> 20) % n | 1;
    while (gcd(step, n) != 1) {
      step += 2;
    }
    start = (rng >> 7) % n;
  }
  for (u64 i = w; i < n; i += J->workers) {
    run_group((u64)(((unsigned __int128)step * i + start) % n));
  }
  auto add = [](int i, u64 v) { __atomic_fetch_add(&J->stats[i], v, __ATOMIC_SEQ_CST); };
  add(STAT_THREADS, n_threads);
  add(STAT_SWITCHES, n_switch);
  add(STAT_ACCESSES, n_access);
  add(STAT_BARRIERS, n_barriers);
  for (int op = 0; op < MSL_OP_QUAD; op++) {
    add(STAT_SIMD + op, n_simd[op]);
  }
  J->stats[STAT_THREADGROUP_BYTES] = tg_total;
}

X int msl_run(Job* job) {
  J = job;
  lib_lo = 0;
  dl_iterate_phdr(lib_range, (void*)J->fn);
  for (u32 i = 0; i < J->nbufs; i++) {
    Buf& b = J->bufs[i];
    if ((J->races & 2) && b.writable) {
      b.shadow = (u64)shared(b.n * sizeof(Cell) + 1);
    }
    if (J->count) {
      b.touched = (u64)shared(b.n * sizeof(Touch) + 1);
    }
  }
  int rc = 0;
  pid_t pid[64];
  for (u32 w = 0; w < J->workers; w++) {
    pid[w] = fork();
    if (pid[w] == 0) {
      worker(w);
      _exit(0);
    }
  }
  for (u32 w = 0; w < J->workers; w++) {
    int st = 0;
    if (pid[w] < 0) {
      rc = -1;
      continue;
    }
    waitpid(pid[w], &st, 0);
    if (WIFEXITED(st) && !WEXITSTATUS(st)) {
      continue;
    }
    if (!rc) {
      rc = WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st);
    }
    for (u32 k = w + 1; k < J->workers; k++) {
      if (pid[k] > 0) {
        kill(pid[k], SIGKILL);
      }
    }
  }
  for (u32 i = 0; i < J->nbufs; i++) {
    Buf& b = J->bufs[i];
    if (b.shadow) {
      munmap((void*)b.shadow, b.n * sizeof(Cell) + 1);
    }
    if (b.touched) {
      munmap((void*)b.touched, b.n * sizeof(Touch) + 1);
    }
  }
  return rc;
}
X void* msl_shared(u64 n) {
  return shared(n);
}
X void msl_unshare(void* p, u64 n) {
  munmap(p, n);
}
// Called by counted builds (counting.py) at the start of every basic block.
X void msl_block(u32 block) {
  J->blocks[block]++;
}
