// Decoding loops with the structure that two published packages describe, for counting: what each does per 8 weights.
// Written from their descriptions; neither their source nor exact, where a description leaves a choice.
#include <metal_stdlib>

using namespace metal;

// 3INST: what both decode with; the byte sum of mul1 and the missing addition of MCG do not change the comparison.
METAL_FUNC half value(uint window) {
  const uint x = ((window * 89226354u + 64248484u) & 0x8fff8fffu) ^ 0x3b603b60u;
  const half2 terms = as_type<half2>(x);
  return terms.x + terms.y;
}

// escha-mlx: direct loads of code words and x, one 64-bit merge per 32 bits of windows, then constant extracts.
template <int K, int R>
[[kernel]] void escha(
    device const uint* codes [[buffer(0)]], device const float* x [[buffer(1)]], device float* y [[buffer(2)]],
    constant uint& tiles [[buffer(3)]], uint lane [[thread_index_in_simdgroup]]) {
  float sums[R][2] = {};
  const uint first = (lane * 8 * K + 8 * K * 32 - 16) % (8 * K * 32);  // bit at which the lane's first window begins
  constexpr int windows = K == 2 ? 8 : 4;                              // that a 32-bit word holds
  for (uint t = 0; t < tiles; ++t) {
    device const uint* tile = codes + t * 8 * K;
    half w[8];
    _Pragma("clang loop unroll(full)") for (int part = 0; part < 8 / windows; ++part) {
      const uint bit = first + part * windows * K;
      const ulong pair = (ulong(tile[bit / 32]) << 32) | tile[bit / 32 + 1];
      const uint bits = uint(pair >> (48 - bit % 32 - windows * K));
      _Pragma("clang loop unroll(full)") for (int i = 0; i < windows; ++i) {
        w[part * windows + i] = value((bits >> ((windows - 1 - i) * K)) & 0xffff);
      }
    }
    _Pragma("clang loop unroll(full)") for (int r = 0; r < R; ++r) {
      const float4 v = ((device const float4*)x)[(r * tiles + t) * 4 + lane % 4];
      _Pragma("clang loop unroll(full)") for (int i = 0; i < 8; ++i) {
        sums[r][i / 4] = fma(float(w[i]), v[i % 4], sums[r][i / 4]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    y[(r * 2) * 32 + lane] = sums[r][0];
    y[(r * 2 + 1) * 32 + lane] = sums[r][1];
  }
}

// PonyExl3: per weight a shuffle that fetches its code word and a 64-bit shift, both by amounts that differ by lane.
[[kernel]] void pony(
    device const uint* codes [[buffer(0)]], device const float* x [[buffer(1)]], device float* y [[buffer(2)]],
    constant uint& tiles [[buffer(3)]], device const ushort* places [[buffer(4)]],
    uint lane [[thread_index_in_simdgroup]]) {
  ushort from[8];
  ushort by[8];
  _Pragma("clang loop unroll(full)") for (uint i = 0; i < 8; ++i) {
    from[i] = places[lane * 16 + i] % 32;
    by[i] = places[lane * 16 + 8 + i] % 32;
  }
  float sum = 0.0f;
  for (uint t = 0; t < tiles; ++t) {
    const uint word = codes[t * 32 + lane];
    const float4 v = ((device const float4*)x)[t * 4 + lane % 4];
    uint before = codes[t * 32 + (lane + 31) % 32];
    _Pragma("clang loop unroll(full)") for (uint i = 0; i < 8; ++i) {
      const uint own = simd_shuffle(word, from[i]);
      const uint bits = uint(((ulong(before) << 32) | own) >> by[i]);
      before = own;
      sum = fma(float(value(bits & 0xffff)), v[i % 4], sum);
    }
  }
  y[lane] = sum;
}
