// Type traits and numeric limits.
#pragma once

namespace metal {
// ---- type traits
template <class T, T v>
struct integral_constant {
  static constexpr MSL_C T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <class T>
struct remove_addrspace;  // `thread T&` deduces T = __private X here: is_same must not see that
template <class A, class B>
struct msl_is_same : false_type {};
template <class A>
struct msl_is_same<A, A> : true_type {};
template <class A, class B>
struct is_same
    : msl_is_same<typename remove_addrspace<A>::type, typename remove_addrspace<B>::type> {};
template <class T>
struct remove_const {
  typedef T type;
};
template <class T>
struct remove_const<const T> {
  typedef T type;
};
template <class T>
struct remove_volatile {
  typedef T type;
};
template <class T>
struct remove_volatile<volatile T> {
  typedef T type;
};
template <class T>
struct remove_reference {
  typedef T type;
};
template <class T>
struct remove_reference<T&> {
  typedef T type;
};
template <class T>
struct remove_reference<T&&> {
  typedef T type;
};
template <class T>
struct remove_pointer {
  typedef T type;
};
template <class T>
struct remove_pointer<T*> {
  typedef T type;
};
template <class T>
struct remove_addrspace {
  typedef T type;
};
template <class T>
struct remove_addrspace<MSL_D T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<MSL_C T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<MSL_G T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<__private T> {
  typedef T type;
};
template <class T>
struct remove_addrspace<__generic T> {
  typedef T type;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
using remove_const_t = typename remove_const<T>::type;
template <class T>
struct remove_cv {
  typedef typename remove_const<typename remove_volatile<T>::type>::type type;
};
template <class T>
using remove_cv_t = remove_addrspace_t<typename remove_cv<T>::type>;
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
struct decay {
  typedef remove_cv_t<remove_reference_t<T>> type;
};
template <class T>
using decay_t = typename decay<T>::type;
template <class T>
struct msl_float_ : false_type {};
template <>
struct msl_float_<float> : true_type {};
template <>
struct msl_float_<half> : true_type {};
template <>
struct msl_float_<bfloat> : true_type {};
template <class T>
struct is_floating_point : msl_float_<remove_cv_t<T>> {};
template <class T>
struct is_integral : bool_constant<__is_integral(remove_cv_t<T>)> {};
template <class T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T>
struct is_scalar : is_arithmetic<T> {};
template <class T>
struct is_signed : bool_constant<is_floating_point<T>::value || __is_signed(remove_cv_t<T>)> {};
template <class T>
struct is_unsigned : bool_constant<__is_unsigned(remove_cv_t<T>)> {};
template <class T>
struct is_pointer : bool_constant<__is_pointer(T)> {};
template <class T>
struct is_const : false_type {};
template <class T>
struct is_const<const T> : true_type {};
template <class T>
struct is_void : is_same<remove_cv_t<T>, void> {};
template <class A, class B>
struct is_base_of : bool_constant<__is_base_of(A, B)> {};
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class...>
struct _disjunction : false_type {};
template <class A, class... R>
struct _disjunction<A, R...> : bool_constant<A::value || _disjunction<R...>::value> {};
template <class...>
struct _conjunction : true_type {};
template <class A, class... R>
struct _conjunction<A, R...> : bool_constant<A::value && _conjunction<R...>::value> {};
template <class A>
struct make_unsigned {
  typedef A type;
};
template <>
struct make_unsigned<int> {
  typedef uint type;
};
template <>
struct make_unsigned<short> {
  typedef ushort type;
};
template <>
struct make_unsigned<char> {
  typedef uchar type;
};
template <>
struct make_unsigned<long> {
  typedef ulong type;
};
template <class A>
using make_unsigned_t = typename make_unsigned<A>::type;
template <class T>
T&& declval();
#define MSL_TV(t) \
  template <class T> \
  constexpr MSL_C bool t##_v = t<T>::value;
MSL_TV(is_floating_point)
MSL_TV(is_integral)
MSL_TV(is_arithmetic)
MSL_TV(is_scalar)
MSL_TV(is_signed)
MSL_TV(is_unsigned)
MSL_TV(is_pointer)
MSL_TV(is_const)
MSL_TV(is_void)
template <class A, class B>
constexpr MSL_C bool is_same_v = is_same<A, B>::value;
template <class A, class B>
constexpr MSL_C bool is_convertible_v = is_convertible<A, B>::value;
template <class A, class B>
constexpr MSL_C bool is_base_of_v = is_base_of<A, B>::value;

// ---- numeric_limits
template <class T>
struct msl_ilim {
  static constexpr MSL_C bool is_specialized = true, is_integer = true, is_signed = T(-1) < T(0),
                              has_infinity = false;
  static constexpr MSL_C int digits = sizeof(T) * 8 - is_signed;
  static constexpr T max() { return T(ulong(-1) >> (64 - sizeof(T) * 8 + is_signed)); }
  static constexpr T min() { return is_signed ? T(-long(max()) - 1) : T(0); }
  static constexpr T lowest() { return min(); }
  static constexpr T infinity() { return T(0); }
};
template <class T>
struct numeric_limits : msl_ilim<T> {};
template <>
struct numeric_limits<bool> {
  static constexpr bool max() { return true; }
  static constexpr bool min() { return false; }
};
#define MSL_FLIM(T, I, mx, mn, ep, inf, nan, dg) \
  template <> \
  struct numeric_limits<T> { \
    static constexpr MSL_C bool is_specialized = true, is_integer = false, is_signed = true, \
                                has_infinity = true; \
    static constexpr MSL_C int digits = dg; \
    static constexpr T max() { return __builtin_bit_cast(T, I(mx)); } \
    static constexpr T lowest() { \
      return __builtin_bit_cast(T, I(mx | I(1) << (sizeof(T) * 8 - 1))); \
    } \
    static constexpr T min() { return __builtin_bit_cast(T, I(mn)); } \
    static constexpr T epsilon() { return __builtin_bit_cast(T, I(ep)); } \
    static constexpr T infinity() { return __builtin_bit_cast(T, I(inf)); } \
    static constexpr T quiet_NaN() { return __builtin_bit_cast(T, I(nan)); } \
    static constexpr T denorm_min() { return __builtin_bit_cast(T, I(1)); } \
  };
MSL_FLIM(float, uint, 0x7f7fffff, 0x00800000, 0x34000000, 0x7f800000, 0x7fc00000, 24)
MSL_FLIM(half, ushort, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00, 11)
MSL_FLIM(bfloat, ushort, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0, 8)

}  // namespace metal
