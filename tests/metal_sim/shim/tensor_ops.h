// matmul2d of MetalPerformancePrimitives on cooperative tensors, with the lanes of a simdgroup as MLX's nax.h has them:
// that file and MLX's kernels on it are all that is known of the layout without a Mac.
#pragma once

namespace metal {
struct execution_simdgroup {};
}  // namespace metal

namespace msl_tensor_ops {
// A class as a template argument is C++20: matmul2d takes what a descriptor converts to.
struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };
  int m, n, k;
  bool transpose_left, transpose_right, relaxed_precision;
  mode matmul_mode;
  MSL_INL constexpr matmul2d_descriptor(int rows, int columns, int depth, bool left = false, bool right = false,
                                        bool relaxed = false, mode what = mode::multiply)
      : m(rows), n(columns), k(depth), transpose_left(left), transpose_right(right), relaxed_precision(relaxed),
        matmul_mode(what) {}
  MSL_INL constexpr operator uint() const {
    return uint(m) | uint(n) << 6 | uint(k) << 12 | uint(transpose_left) << 18 | uint(transpose_right) << 19 |
        uint(relaxed_precision) << 20 | uint(matmul_mode == mode::multiply_accumulate) << 21;
  }
};

// Operand: 0 left, 1 right, 2 destination. Elements begin as whatever the registers hold.
template <uint Descriptor, int Operand, class T, int N>
struct cooperative_tensor {
  T value[N];
  uchar end;  // or the bounds of an array at the end would not be checked
  MSL_INL static constexpr ushort get_capacity() { return N; }
  MSL_INL MSL_T T& operator[](ushort i) MSL_T { return value[i]; }
  MSL_INL const MSL_T T& operator[](ushort i) const MSL_T { return value[i]; }
};

template <class A, class B, class C>
struct msl_matmul_types : metal::false_type {};
#define MSL_MATMUL(A, B, C) \
  template <> \
  struct msl_matmul_types<A, B, C> : metal::true_type {};
MSL_MATMUL(half, half, half)
MSL_MATMUL(half, half, float)
MSL_MATMUL(half, float, float)
MSL_MATMUL(float, half, float)
MSL_MATMUL(float, float, float)
MSL_MATMUL(bfloat, bfloat, bfloat)
MSL_MATMUL(bfloat, bfloat, float)
MSL_MATMUL(bfloat, float, float)
MSL_MATMUL(float, bfloat, float)
MSL_MATMUL(bfloat, half, float)
MSL_MATMUL(half, bfloat, float)

// With relaxed precision floats keep 10 bits of their mantissa, as TF32: the least that has been reported.
template <class T>
MSL_INL float msl_tensor_operand(T v, bool relaxed) {
  float f = float(v);
  if constexpr (metal::msl_is_same<T, float>::value) {
    if (relaxed && !__builtin_isnan(f) && !__builtin_isinf(f)) {
      uint bits = __builtin_astype(f, uint);
      bits += 0xfff + (bits >> 13 & 1);
      f = __builtin_astype(bits & ~0x1fffu, float);
    }
  }
  return f;
}

template <uint D, class Scope>
struct matmul2d {
  static_assert(metal::msl_is_same<Scope, metal::execution_simdgroup>::value, "only one simdgroup");
  static constexpr MSL_C int m = D & 63, n = D >> 6 & 63, k = D >> 12 & 63;
  static_assert(m % 16 == 0 || n % 16 == 0, "at least one of M and N must be a multiple of 16");
  static_assert((m == 16 && n == 32 && k == 16) || (m == 16 && n == 16 && k == 32),
                "only the layouts of 16x32x16 and 16x16x32 are known");

  template <class A, class B, class C>
  MSL_INL cooperative_tensor<D, 0, A, m * k / 32> get_left_input_cooperative_tensor() const MSL_T {
    static_assert(msl_matmul_types<A, B, C>::value, "matmul2d has no such types");
    cooperative_tensor<D, 0, A, m * k / 32> tensor;
    return tensor;
  }
  template <class A, class B, class C>
  MSL_INL cooperative_tensor<D, 1, B, k * n / 32> get_right_input_cooperative_tensor() const MSL_T {
    static_assert(msl_matmul_types<A, B, C>::value, "matmul2d has no such types");
    cooperative_tensor<D, 1, B, k * n / 32> tensor;
    return tensor;
  }
  // The types must be plain: macOS 27 rejects decltype of a variable, which has an address space.
  template <class Left, class Right, class C>
  MSL_INL cooperative_tensor<D, 2, C, m * n / 32> get_destination_cooperative_tensor() const MSL_T {
    static_assert(metal::msl_is_same<Left, typename metal::remove_addrspace<Left>::type>::value &&
                      metal::msl_is_same<Right, typename metal::remove_addrspace<Right>::type>::value,
                  "a cooperative tensor's type with an address space: use metal::remove_addrspace_t");
    cooperative_tensor<D, 2, C, m * n / 32> tensor;
    return tensor;
  }
  template <class A, class B, class C>
  MSL_INL void run(MSL_T cooperative_tensor<D, 0, A, m * k / 32>& a, MSL_T cooperative_tensor<D, 1, B, k * n / 32>& b,
                   MSL_T cooperative_tensor<D, 2, C, m * n / 32>& c, MSL_SITE) const MSL_T {
    constexpr bool relaxed = D >> 20 & 1, accumulates = D >> 21 & 1;
    struct {
      float a[16], b[16], c[16];
    } in;
    struct {
      float c[16];
    } out;
    for (int i = 0; i < m * k / 32; i++) in.a[i] = msl_tensor_operand(a[i], relaxed);
    for (int i = 0; i < k * n / 32; i++) in.b[i] = msl_tensor_operand(b[i], relaxed);
    for (int i = 0; i < m * n / 32; i++) in.c[i] = accumulates ? float(c[i]) : 0.0f;
    ::msl_simd(MSL_OP_TENSOR_MULTIPLY, MSL_FLOAT, 16, sizeof(in), &in, &out, D & 0xfffff, MSL_AT);
    for (int i = 0; i < m * n / 32; i++) c[i] = C(out.c[i]);
  }
};
}  // namespace msl_tensor_ops
