// The inner matrix of one expert, float16 [k, n]: the tile decoder by itself.
#include "trellis.h"

struct DecodeTile {
  device const ushort* codes;
  device half* out;
  uint tile;
  uint n;
  ushort lane;
  uint zero;

  template <int H, int Codebook>
  METAL_FUNC void run() thread {
    const LanePlaces<H> places = find_places<H>(tile, lane);
    const LaneWeights weights = decode_lane<H, Codebook>(codes, places, lane, zero);
    const uint tiles_per_row = n / MARLIN_TILE;
    const uint row = (tile / tiles_per_row) * MARLIN_TILE + 2 * (lane % 4);
    const uint column = (tile % tiles_per_row) * MARLIN_TILE + lane / 4;
    MARLIN_UNROLL
    for (int i = 0; i < kLaneWeights; ++i) {
      const uint r = row + (i & 1) + 8 * ((i >> 1) & 1);
      out[ulong(r) * n + column + 8 * (i >> 2)] = weights.value[i];
    }
  }
};

// One simdgroup per tile.
[[kernel]] void trellis_decode(
    constant MarlinDecodeArgs& args [[buffer(0)]],
    device const uint* codes [[buffer(1)]],
    device const long* offsets [[buffer(2)]],
    device const uint* formats [[buffer(3)]],
    device half* out [[buffer(4)]],
    uint group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const uint tile = group * simdgroups + simdgroup;
  if (tile >= args.tiles) {
    return;
  }
  DecodeTile body = {(device const ushort*)(codes + offsets[args.expert]), out, tile, args.n, lane, args.zero};
  for_format<widths, codebooks>(body, formats[args.expert]);
}
