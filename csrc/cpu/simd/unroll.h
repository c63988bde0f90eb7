// Loops whose index is a constant in every turn, so that arrays of vectors stay in registers.
#pragma once

namespace mlx_marlin::cpu {

#define MARLIN_INLINE inline __attribute__((always_inline))
#define MARLIN_LAMBDA __attribute__((always_inline))

template <int I>
struct Index {
  constexpr operator int() const {
    return I;
  }
};

template <int N, int I = 0, typename F>
MARLIN_INLINE void unroll(F&& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    unroll<N, I + 1>(f);
  }
}

}  // namespace mlx_marlin::cpu
