// Types and the state of one worker process, which runs one threadgroup at a time.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../shim/op_codes.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef uintptr_t uptr;
#define X extern "C" __attribute__((visibility("default")))
#define PC ((uptr)__builtin_return_address(0))
#define LIKELY(x) __builtin_expect(!!(x), 1)

enum {
  MAXT = 1024,       // threads per threadgroup, Metal's limit
  TG_LIMIT = 32768,  // bytes of threadgroup memory, Metal's limit
  ARENA = 1 << 18,   // where threadgroup variables live, with red zones between them
  REDZONE = 64,
};
static const size_t STK = 256 * 1024;  // a thread's stack, of which 4 KB are a guard page

struct Ids {
  u32 tpig[3], tgpig[3], tpitg[3], tptg[3], dtptg[3], tgpg[3], tpg[3], tiitg[3], lane[3], sg[3], sgptg[3], qlane[3],
      qg[3], qgptg[3], tps[3], zero[3];
};
struct Buf {
  u8* p;
  u64 n;
  u32 writable, index;
  u64 shadow, touched;
};
// Last group (plus one) that read and wrote a byte, for counting.
struct Touch {
  u32 reader, writer;
};
struct TgArg {
  u32 argpos, bytes;
};
struct Job {  // mirrored by ctypes in launch.py
  void (*fn)(const u64*, const Ids*);
  const char* kernel;
  u64* args;
  Buf* bufs;
  TgArg* tgargs;
  char* err;
  u64* stats;
  u64* blocks;
  u32 nargs, nbufs, ntgargs, errsize;
  u32 grid[3], threads[3], total[3];
  u32 order, seed, races, tolerant, uninit, workers, timeout, count;
};
// Places in Job::stats. From STAT_BUFFERS on: six numbers per buffer.
enum {
  STAT_THREADS,
  STAT_SWITCHES,
  STAT_ACCESSES,
  STAT_THREADGROUP_BYTES,
  STAT_BARRIERS,
  STAT_SIMD = 8,  // one per operation code
  STAT_BUFFERS = 64,
};
enum { READ, READ_PER_GROUP, READ_DISTINCT, WRITTEN, WRITTEN_PER_GROUP, WRITTEN_DISTINCT };
enum { ORDER_FORWARD, ORDER_REVERSE, ORDER_RANDOM };
// A thread waits for its lanes (SIMD) or for its threadgroup (BAR).
enum St { READY, SIMD, BAR, DONE };
// A fiber: one thread of the kernel.
struct F {
  void* sp;
  u32 st, tid, sg, lane;
  int op, type, ncomp, size;
  const void* in;
  void* out;
  u32 arg, site;
  uptr pc;
  Ids ids;
};
// Shadow cell, one per byte of threadgroup memory and of writable device buffers: last write and
// last read as (stamp of the barrier interval, simdgroup barriers passed, thread, code address).
struct Cell {
  u64 wst, rst;
  u16 wsep, rsep, wtid, rtid;
  u32 wpc, rpc;
};
enum { R_ANY = 0xffff, R_GROUPS = 0xfffe, R_SG = 0x8000 };
struct TgVar {
  u32 key, off, size;
};

static Job* J;  // the run
static F* fib;
static F* cur;  // the running thread
static void* sched_sp;
static u8* stacks;
static uptr stk_lo, stk_hi, lib_lo, lib_hi, lib_base;
static u32 nthreads, nlive, nbar, gid[3];
static u64 gseq, tg_stamp, dev_stamp;
static u16 sep[MAXT / 32 + 1];
static u32 sgcnt[MAXT / 32 + 1], sgwait[MAXT / 32 + 1], qwait[MAXT / 4 + 1];
static F* ready[MAXT];
static u32 nready;
static u64 rng;
static u8* arena;
static Cell* arena_sh;
static TgVar vars[256];
static u32 nvars, arena_used, tg_total;
static u64 n_threads, n_switch, n_access, n_barriers, n_simd[MSL_OP_QUAD];

extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
