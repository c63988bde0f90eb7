// Simdgroup operations, once all lanes of a simdgroup (or quad) have arrived.
#pragma once

#include "report.h"

// Lanes that take part: L[i] for every bit i of mask, out of n.
struct Lanes {
  F** L;
  u32 mask, n;
  bool has(int i) const {
    return i >= 0 && i < (int)n && (mask >> i & 1);
  }
  F* first() const {
    return L[__builtin_ctz(mask)];
  }
};

template <class T>
static T combine(int op, T a, T b) {
  switch (op) {
    case MSL_OP_SUM:
    case MSL_OP_PREFIX_INCLUSIVE_SUM:
    case MSL_OP_PREFIX_EXCLUSIVE_SUM:
      return T(a + b);
    case MSL_OP_PRODUCT:
    case MSL_OP_PREFIX_INCLUSIVE_PRODUCT:
    case MSL_OP_PREFIX_EXCLUSIVE_PRODUCT:
      return T(a * b);
    case MSL_OP_MAX:
      return b != b ? a : (a != a || a < b) ? b : a;
    case MSL_OP_MIN:
      return b != b ? a : (a != a || b < a) ? b : a;
  }
  if constexpr (__is_integral(T)) {
    return op == MSL_OP_AND ? T(a & b) : op == MSL_OP_OR ? T(a | b) : T(a ^ b);
  }
  return a;
}

template <class T>
static void prefix(int op, const Lanes& s, int c) {
  bool product = op >= MSL_OP_PREFIX_INCLUSIVE_PRODUCT;
  bool inclusive = op == MSL_OP_PREFIX_INCLUSIVE_SUM || op == MSL_OP_PREFIX_INCLUSIVE_PRODUCT;
  T sum = T(product ? 1 : 0);
  for (u32 i = 0; i < s.n; i++) {
    if (!s.has(i)) {
      continue;
    }
    T v;
    memcpy(&v, (u8*)s.L[i]->in + c * sizeof(T), sizeof(T));
    T next = combine(op, sum, v), r = inclusive ? next : sum;
    sum = next;
    memcpy((u8*)s.L[i]->out + c * sizeof(T), &r, sizeof(T));
  }
}

// A butterfly (xor 1, 2, 4, 8, 16) in which absent lanes pass their partner's value through.
template <class T>
static void butterfly(int op, const Lanes& s, int c) {
  T v[32];
  bool on[32];
  for (u32 i = 0; i < s.n; i++) {
    on[i] = s.has(i);
    if (on[i]) {
      memcpy(&v[i], (u8*)s.L[i]->in + c * sizeof(T), sizeof(T));
    }
  }
  for (u32 m = 1; m < s.n; m <<= 1) {
    T w[32];
    bool was_on[32];
    memcpy(w, v, sizeof v);
    memcpy(was_on, on, sizeof on);
    for (u32 i = 0; i < s.n; i++) {
      u32 j = i ^ m;
      if (j >= s.n || !was_on[j]) {
        continue;
      }
      v[i] = !was_on[i] ? w[j] : i < j ? combine(op, w[i], w[j]) : combine(op, w[j], w[i]);
      on[i] = true;
    }
  }
  for (u32 i = 0; i < s.n; i++) {
    if (s.has(i)) {
      memcpy((u8*)s.L[i]->out + c * sizeof(T), &v[i], sizeof(T));
    }
  }
}

template <class T>
static void reduce(int op, const Lanes& s) {
  for (int c = 0; c < s.first()->ncomp; c++) {
    op >= MSL_OP_PREFIX_INCLUSIVE_SUM ? prefix<T>(op, s, c) : butterfly<T>(op, s, c);
  }
}

static void reduce_any(int op, const Lanes& s) {
  switch (s.first()->type) {
    case MSL_FLOAT:
      return reduce<float>(op, s);
    case MSL_HALF:
      return reduce<_Float16>(op, s);
    case MSL_BFLOAT:
      return reduce<__bf16>(op, s);
    case MSL_CHAR:
      return reduce<int8_t>(op, s);
    case MSL_UCHAR:
      return reduce<u8>(op, s);
    case MSL_SHORT:
      return reduce<int16_t>(op, s);
    case MSL_USHORT:
      return reduce<u16>(op, s);
    case MSL_UINT:
      return reduce<u32>(op, s);
    case MSL_ULONG:
      return reduce<u64>(op, s);
    // Sums and products wrap in Metal; unsigned arithmetic does not trap here.
    case MSL_INT:
      return op == MSL_OP_MAX || op == MSL_OP_MIN ? reduce<int32_t>(op, s) : reduce<u32>(op, s);
    case MSL_LONG:
      return op == MSL_OP_MAX || op == MSL_OP_MIN ? reduce<int64_t>(op, s) : reduce<u64>(op, s);
  }
  fail(s.first()->pc, "simd operation on an unsupported type");
}

// Where lane i reads from; `filled` says that it reads the fill value of that lane instead.
static int shuffle_source(int op, int i, int arg, int n, int modulo, bool* filled) {
  int base = i / modulo * modulo, r = i % modulo;
  switch (op) {
    case MSL_OP_SHUFFLE_XOR:
      return i ^ arg;
    case MSL_OP_SHUFFLE_UP:
      return i - arg < 0 ? i : i - arg;
    case MSL_OP_SHUFFLE_DOWN:
      return i + arg >= n ? i : i + arg;
    case MSL_OP_ROTATE_UP:
      return (i - arg % modulo + modulo) % modulo;
    case MSL_OP_ROTATE_DOWN:
      return (i + arg) % modulo;
    case MSL_OP_FILL_UP:
      *filled = r < arg;
      return r >= arg ? i - arg : base + modulo - arg + r;
    case MSL_OP_FILL_DOWN:
      *filled = r + arg >= modulo;
      return r + arg < modulo ? i + arg : base + r + arg - modulo;
  }
  return arg;
}

static void shuffle(int op, const Lanes& s) {
  F* a = s.first();
  bool fill = op == MSL_OP_FILL_UP || op == MSL_OP_FILL_DOWN;
  for (u32 i = 0; i < s.n; i++) {
    if (!s.has(i)) {
      continue;
    }
    F* f = s.L[i];
    bool uniform = f->arg == a->arg && (!fill || f->ncomp == a->ncomp);
    if (op != MSL_OP_SHUFFLE && !uniform) {
      cur = f;
      fail(
          a->pc,
          "simd shuffle/broadcast with a delta, mask or lane that differs between lanes (%u and "
          "%u)",
          a->arg, f->arg);
    }
    bool filled = false;
    int from = shuffle_source(op, i, f->arg, s.n, fill ? a->ncomp : (int)s.n, &filled);
    if (!s.has(from)) {
      cur = f;
      fail(
          f->pc, "simd shuffle reads lane %d, which is %s", from, from >= 0 && from < 32 ? "inactive" : "out of range");
    }
    memcpy(f->out, (const u8*)s.L[from]->in + (filled ? f->size : 0), f->size);
  }
}

static void ballot(const Lanes& s) {
  u32 bits = 0;
  for (u32 i = 0; i < s.n; i++) {
    if (s.has(i) && *(u32*)s.L[i]->in) {
      bits |= 1u << i;
    }
  }
  u64 both = (u64)s.mask << 32 | bits;
  for (u32 i = 0; i < s.n; i++) {
    if (s.has(i)) {
      memcpy(s.L[i]->out, &both, 8);
    }
  }
}

// Lane l holds row ((l/4)&4) + (l/2)%4 and columns ((l/4)&2)*2 + (l%2)*2 + {0, 1}.
static void matrix_multiply(const Lanes& s) {
  float m[3][8][8];
  auto row = [](u32 l) { return ((l / 4) & 4) + (l / 2) % 4; };
  auto column = [](u32 l) { return ((l / 4) & 2) * 2 + (l % 2) * 2; };
  for (u32 i = 0; i < 32; i++) {
    for (int k = 0; k < 6; k++) {
      m[k / 2][row(i)][column(i) + k % 2] = ((const float*)s.L[i]->in)[k];
    }
  }
  for (int r = 0; r < 8; r++) {
    for (int k = 0; k < 8; k++) {
      for (int c = 0; c < 8; c++) {
        m[2][r][c] = __builtin_fmaf(m[0][r][k], m[1][k][c], m[2][r][c]);
      }
    }
  }
  for (u32 i = 0; i < 32; i++) {
    memcpy(s.L[i]->out, &m[2][row(i)][column(i)], 8);
  }
}

// Matrices of 16x16 fragments, of which lane l holds rows m and m + 8 with m = ((l/4)&4) + (l/2)%4, and columns 4 q to
// 4 q + 3 with q = ((l/4)&2) + l%2: four values of the first row, then four of the second. Values: 16 of a, b and c.
struct Fragments {
  u32 rows, columns;
  bool transposed;
  float value[32][32];

  void place(u32 lane, u32 element, u32* row, u32* column) const {
    u32 fragment = element / 8, across = columns > 16;
    *row = ((lane / 4) & 4) + (lane / 2) % 4 + element / 4 % 2 * 8 + (across ? 0 : fragment * 16);
    *column = (((lane / 4) & 2) + lane % 2) * 4 + element % 4 + (across ? fragment * 16 : 0);
  }
  void read(const Lanes& s, u32 first) {
    for (u32 lane = 0; lane < 32; lane++) {
      for (u32 i = 0; i < rows * columns / 32; i++) {
        u32 r, c;
        place(lane, i, &r, &c);
        value[r][c] = ((const float*)s.L[lane]->in)[first + i];
      }
    }
  }
  float at(u32 r, u32 c) const {
    return transposed ? value[c][r] : value[r][c];
  }
};

// The argument: m, n and k in 6 bits each, then whether a and b are transposed.
static void tensor_multiply(const Lanes& s) {
  u32 arg = s.first()->arg, m = arg & 63, n = arg >> 6 & 63, k = arg >> 12 & 63;
  bool ta = arg >> 18 & 1, tb = arg >> 19 & 1;
  Fragments a = {ta ? k : m, ta ? m : k, ta}, b = {tb ? n : k, tb ? k : n, tb}, c = {m, n, false};
  a.read(s, 0);
  b.read(s, 16);
  c.read(s, 32);
  for (u32 i = 0; i < k; i++) {
    for (u32 row = 0; row < m; row++) {
      for (u32 column = 0; column < n; column++) {
        c.value[row][column] = __builtin_fmaf(a.at(row, i), b.at(i, column), c.value[row][column]);
      }
    }
  }
  for (u32 lane = 0; lane < 32; lane++) {
    for (u32 i = 0; i < m * n / 32; i++) {
      u32 r, column;
      c.place(lane, i, &r, &column);
      ((float*)s.L[lane]->out)[i] = c.value[r][column];
    }
  }
}

static void perform(F** L, u32 mask, u32 n) {
  Lanes s = {L, mask, n};
  F* a = s.first();
  int op = a->op >= MSL_OP_QUAD ? a->op - MSL_OP_QUAD : a->op;
  n_simd[op]++;
  switch (op) {
    case MSL_OP_BARRIER:
      return;
    case MSL_OP_BALLOT:
      return ballot(s);
    case MSL_OP_BROADCAST_FIRST:
      for (u32 i = 0; i < n; i++) {
        if (s.has(i)) {
          memcpy(L[i]->out, a->in, a->size);
        }
      }
      return;
    case MSL_OP_IS_FIRST:
      for (u32 i = 0; i < n; i++) {
        if (s.has(i)) {
          *(u32*)L[i]->out = L[i] == a;
        }
      }
      return;
    case MSL_OP_MATRIX_LANE:
    case MSL_OP_MATRIX_MULTIPLY:
    case MSL_OP_TENSOR_MULTIPLY:
      if (mask != 0xffffffffu) {
        fail(
            a->pc, "%s operation needs all 32 lanes (active mask %#x)",
            op == MSL_OP_TENSOR_MULTIPLY ? "matmul2d" : "simdgroup_matrix", mask);
      }
      if (op == MSL_OP_TENSOR_MULTIPLY) {
        return tensor_multiply(s);
      }
      if (op == MSL_OP_MATRIX_MULTIPLY) {
        return matrix_multiply(s);
      }
      for (u32 i = 0; i < n; i++) {
        *(u32*)L[i]->out = i;
      }
      return;
  }
  bool moves = op <= MSL_OP_BROADCAST || op == MSL_OP_FILL_UP || op == MSL_OP_FILL_DOWN;
  moves ? shuffle(op, s) : reduce_any(op, s);
}
