// Every access of the kernel: bounds, alignment, writes to constants, data races.
#pragma once

#include "report.h"

// ---- threadgroup memory
static u32 tg_place(u32 key, u64 size) {
  if (nvars == 256) {
    fail(0, "too many threadgroup variables");
  }
  u32 off = (arena_used + REDZONE + 255) & ~255u;
  tg_total = ((tg_total + 15) & ~15u) + size;
  if (tg_total > TG_LIMIT) {
    fail(0, "threadgroup memory: %u bytes, the limit is %u", tg_total, TG_LIMIT);
  }
  vars[nvars++] = {key, off, (u32)size};
  arena_used = off + size;
  return off;
}
X u64 msl_tg(u32 key, u64 size) {
  for (u32 i = 0; i < nvars; i++) {
    if (vars[i].key == key && vars[i].size == size) {
      return (u64)arena + vars[i].off;
    }
  }
  u32 o = tg_place(key, size);
  memset(arena + o, 0xff, size);
  return (u64)arena + o;
}

// ---- memory checks
static __attribute__((noinline, noreturn)) void race(
    bool dev, uptr a, u32 n, bool w, bool ow, u32 otid, u64 ost, u32 opc, uptr pc) {
  char o[128];
  if (ost >> 24 != gseq) {
    snprintf(o, sizeof o, "threadgroup number %lu", (long)(ost >> 24) - 1);
  } else if (otid & 0x8000) {
    snprintf(o, sizeof o, "other threads");
  } else {
    where(o, sizeof o, otid);
  }
  fail(
      pc,
      "data race on %s memory: %s of %u bytes at %#lx conflicts with an earlier %s by %s (@pc%x) "
      "without a barrier (with the right mem_flags) between them",
      dev ? "device" : "threadgroup", w ? "write" : "read", n, a, ow ? "write" : "read", o, opc);
}
static inline bool hb_conflict(bool dev, u64 st, u64 me, u16 t2, u16 s2) {
  if (LIKELY(st == 0)) {
    return false;
  }
  if (st >> 24 != me >> 24) {
    return dev;
  }
  if (st != me || t2 == cur->tid) {
    return false;
  }
  return !(t2 / 32 == cur->sg && s2 != sep[cur->sg]);
}
static void shadow(Cell* c, uptr a, u32 n, bool w, bool dev, uptr pc) {
  u64 me = dev ? dev_stamp : tg_stamp;
  u16 tid = cur->tid, sg = cur->sg, sp = sep[sg];
  u32 p = pc - lib_base;
  for (u32 i = 0; i < n; i++, c++) {
    if (!w && !dev && J->uninit && c->wst >> 24 != gseq) {
      fail(pc, "read of uninitialised threadgroup memory (byte %#lx)", a + i);
    }
    if (hb_conflict(dev, c->wst, me, c->wtid, c->wsep)) {
      race(dev, a, n, w, true, c->wtid, c->wst, c->wpc, pc);
    }
    if (w) {
      if (c->rst) {
        bool bad;
        if (c->rst >> 24 != gseq || (dev && c->rtid == R_GROUPS)) {
          bad = dev;
        } else if (c->rst != me) {
          bad = false;
        } else if (c->rtid == R_ANY) {
          bad = true;
        } else if (c->rtid & R_SG) {
          bad = (c->rtid & 0x7fff) != sg || c->rsep == sp;
        } else {
          bad = hb_conflict(dev, c->rst, me, c->rtid, c->rsep);
        }
        if (bad) {
          race(dev, a, n, true, false, c->rtid, c->rst, c->rpc, pc);
        }
      }
      c->wst = me;
      c->wsep = sp;
      c->wtid = tid;
      c->wpc = p;
    } else {
      if (c->rst == me) {
        if (c->rtid == tid || c->rtid == R_ANY) {
          if (c->rtid == tid) {
            c->rsep = sp;
          }
          continue;
        }
        u32 rsg = c->rtid & R_SG ? c->rtid & 0x7fff : c->rtid / 32;
        if (rsg != sg) {
          c->rtid = R_ANY;
        } else if (c->rsep != sp) {
          c->rtid = tid;
        } else {
          c->rtid = R_SG | sg;
        }
        c->rsep = sp;
        c->rpc = p;
      } else if (dev && c->rst && (c->rst >> 24 != gseq || c->rtid == R_GROUPS)) {
        c->rtid = R_GROUPS;
        c->rst = me;
        c->rpc = p;
      } else {
        c->rst = me;
        c->rtid = tid;
        c->rsep = sp;
        c->rpc = p;
      }
    }
  }
}
// How often each byte of a buffer is used: in all, once per threadgroup, and once.
static void count(Buf* b, uptr a, u32 n, bool w) {
  u64* c = J->stats + STAT_BUFFERS + 6 * (b - J->bufs) + (w ? WRITTEN : READ);
  Touch* t = (Touch*)b->touched + (a - (uptr)b->p);
  c[0] += n;
  for (u32 i = 0; i < n; i++) {
    u32& last = w ? t[i].writer : t[i].reader;
    c[1] += last != gseq;
    c[2] += last == 0;
    last = gseq;
  }
}
static __attribute__((noinline, noreturn)) void outside(uptr a, u32 n, bool w, uptr pc) {
  const char* what = w ? "write" : "read";
  if (a < 65536) {
    fail(pc, "%s of %u bytes through a null pointer (unbound buffer?), address %#lx", what, n, a);
  }
  Buf* best = nullptr;
  long bd = 0;
  for (u32 i = 0; i < J->nbufs; i++) {
    Buf* q = &J->bufs[i];
    long d = a < (uptr)q->p ? (long)(a - (uptr)q->p) : (long)(a - (uptr)q->p - q->n);
    if (!best || labs(d) < labs(bd)) {
      best = q;
      bd = d;
    }
  }
  if (!best) {
    fail(pc, "out-of-bounds %s of %u bytes at %#lx", what, n, a);
  }
  fail(
      pc, "out-of-bounds device memory %s of %u bytes: %ld bytes %s buffer %u (%lu bytes)", what, n, labs(bd),
      bd < 0 ? "before the start of" : "past the end of", best->index, (long)best->n);
}
static bool within(const Buf& b, uptr a, u32 n) {
  return a >= (uptr)b.p && a + n <= (uptr)b.p + b.n;
}
static __attribute__((noinline)) void access_slow(uptr a, u32 n, bool w, uptr pc, bool atomic = false) {
  if (!cur) {
    return;
  }
  n_access++;
  uptr o = a - (uptr)arena;
  if (o < ARENA) {
    for (u32 i = 0; i < nvars; i++) {
      if (o >= vars[i].off && o + n <= vars[i].off + vars[i].size) {
        if ((J->races & 1) && !atomic) {
          shadow(arena_sh + o, a, n, w, false, pc);
        }
        return;
      }
    }
    fail(pc, "out-of-bounds threadgroup memory %s of %u bytes", w ? "write" : "read", n);
  }
  static Buf* last = nullptr;  // most accesses follow one to the same buffer
  if (!last || !within(*last, a, n)) {
    last = nullptr;
    for (u32 i = 0; i < J->nbufs && !last; i++) {
      if (within(J->bufs[i], a, n)) {
        last = &J->bufs[i];
      }
    }
    if (!last) {
      if (!w && a >= lib_lo && a + n <= lib_hi) {
        return;  // program-scope constants
      }
      outside(a, n, w, pc);
    }
  }
  Buf* b = last;
  if (w && !b->writable) {
    fail(pc, "write to buffer %u, which the kernel declares constant / const", b->index);
  }
  if (b->writable && (J->races & 2) && !atomic) {
    shadow((Cell*)b->shadow + (a - (uptr)b->p), a, n, w, true, pc);
  }
  if (b->touched) {
    count(b, a, n, w);
  }
}
static inline void access(uptr a, u32 n, bool w, uptr pc) {
  if (LIKELY(a - stk_lo < STK - 4096)) {
    return;
  }
  access_slow(a, n, w, pc);
}
static inline void aligned(uptr a, u32 n, uptr pc) {
  if (__builtin_expect(a & (n - 1), 0)) {
    fail(pc, "misaligned %u-byte access at %#lx", n, a);
  }
}
#define RW(n)                                      \
  X void __tsan_read##n(void* p) {                 \
    aligned((uptr)p, n, PC);                       \
    access((uptr)p, n, false, PC);                 \
  }                                                \
  X void __tsan_write##n(void* p) {                \
    aligned((uptr)p, n, PC);                       \
    access((uptr)p, n, true, PC);                  \
  }                                                \
  X void __tsan_read_write##n(void* p) {           \
    access((uptr)p, n, false, PC);                 \
    access((uptr)p, n, true, PC);                  \
  }                                                \
  X void __tsan_unaligned_read##n(void* p) {       \
    access((uptr)p, n, false, PC);                 \
  }                                                \
  X void __tsan_unaligned_write##n(void* p) {      \
    access((uptr)p, n, true, PC);                  \
  }                                                \
  X void __tsan_unaligned_read_write##n(void* p) { \
    access((uptr)p, n, false, PC);                 \
    access((uptr)p, n, true, PC);                  \
  }
RW(1)
RW(2)
RW(4)
RW(8)
RW(16)
X void __tsan_init() {}
X void __tsan_func_entry(void*) {}
X void __tsan_func_exit() {}
X void __tsan_read_range(void* p, u64 n) {
  access((uptr)p, n, false, PC);
}
X void __tsan_write_range(void* p, u64 n) {
  access((uptr)p, n, true, PC);
}
X void* __tsan_memcpy(void* d, const void* s, u64 n) {
  if (n) {
    access((uptr)s, n, false, PC);
    access((uptr)d, n, true, PC);
  }
  return memcpy(d, s, n);
}
X void* __tsan_memmove(void* d, const void* s, u64 n) {
  if (n) {
    access((uptr)s, n, false, PC);
    access((uptr)d, n, true, PC);
  }
  return memmove(d, s, n);
}
X void* __tsan_memset(void* d, int c, u64 n) {
  if (n) {
    access((uptr)d, n, true, PC);
  }
  return memset(d, c, n);
}
