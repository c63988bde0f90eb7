// Rows of a quantized token embedding: each group of 256 elements is a ring of its own, decoded and transformed by one
// simdgroup.
#include "trellis.h"

constant constexpr uint kGroupLane = MARLIN_TILE_SIZE / MARLIN_SIMD_SIZE;  // elements of a lane, one after the other

// The bits of element i of a ring, least significant first in plain 16-bit words.
METAL_FUNC uint element_bits(device const ushort* words, uint i, uint bits) {
  const uint offset = i * bits;
  const uint word = offset / 16;
  const uint shift = offset % 16;
  const uint above = shift + bits > 16 ? uint(words[word + 1]) : 0u;
  return ((uint(words[word]) | (above << 16)) >> shift) & ((1u << bits) - 1u);
}

// One simdgroup per group of a row.
[[kernel]] void trellis_embedding(
    constant MarlinEmbeddingArgs& args [[buffer(0)]],
    device const uint* ids [[buffer(1)]],
    device const ushort* codes [[buffer(2)]],
    device const half* signs [[buffer(3)]],
    device uchar* y [[buffer(4)]],
    uint2 threadgroup_position [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const uint group = threadgroup_position.x * simdgroups + simdgroup;
  if (group >= args.groups) {
    return;
  }
  const uint row = threadgroup_position.y;
  const uint id = ids[row];
  const bool known = id < args.rows;
  const uint ring_words = 1 + MARLIN_TILE * args.bits;
  // An id out of range reads the first row and is answered with NaN.
  device const ushort* ring = codes + (ulong(known ? id : 0) * args.groups + group) * ring_words;
  const float scale = float(as_type<half>(ring[0]));
  // The state before this lane's first element: 16 bits of the elements before it, around the ring.
  const uint first = lane * kGroupLane;
  uint state = 0;
  for (uint age = (15 + args.bits) / args.bits; age > 0; --age) {
    state =
        (state << args.bits) | element_bits(ring + 1, (first + MARLIN_TILE_SIZE - age) % MARLIN_TILE_SIZE, args.bits);
  }
  float v[kGroupLane];
  MARLIN_UNROLL
  for (uint i = 0; i < kGroupLane; ++i) {
    state = ((state << args.bits) | element_bits(ring + 1, first + i, args.bits)) & 0xffffu;
    v[i] = float(codebook_value<MARLIN_CODEBOOK_MUL1>(ushort(state))) * scale;
  }
  // Butterflies of width 1, 2, 4 inside a lane, 8 to 128 between lanes.
  MARLIN_UNROLL
  for (uint width = 1; width < kGroupLane; width *= 2) {
    MARLIN_UNROLL
    for (uint i = 0; i < kGroupLane; ++i) {
      if ((i & width) == 0) {
        const float a = v[i], b = v[i + width];
        v[i] = a + b;
        v[i + width] = a - b;
      }
    }
  }
  MARLIN_UNROLL
  for (ushort mask = 1; mask < MARLIN_SIMD_SIZE; mask *= 2) {
    MARLIN_UNROLL
    for (uint i = 0; i < kGroupLane; ++i) {
      const float other = simd_shuffle_xor(v[i], mask);
      v[i] = fma((lane & mask) ? -1.0f : 1.0f, v[i], other);
    }
  }
  MARLIN_UNROLL
  for (uint i = 0; i < kGroupLane; ++i) {
    const uint column = group * MARLIN_TILE_SIZE + first + i;
    if (column < args.features) {
      const half value = half(v[i] * 0.0625f * float(signs[column]));
      store_element(y, ulong(row) * args.features + column, known ? float(value) : NAN);
    }
  }
}
