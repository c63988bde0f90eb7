// Windows of a trellis tile and the values they stand for. Bit-exact with codec.py.
#pragma once

#include "common.h"

// A lane holds eight consecutive storage positions of a tile: rows {2q, 2q+1, 2q+8, 2q+9} of column c, then
// of column c + 8, where q = lane % 4 and c = lane / 4.
static constant constexpr const int kLaneWeights = 8;

// Left shift by 1 to 8 on the integer adder. A lone shift occupies the multiplier's pipe for 4 cycles (M1, M2), a
// shift by 1 to 4 that feeds an add is free. `zero` is an argument, so that the compiler must keep the adds; the
// second one takes the first's result twice, or both shifts would become one.
template <int S>
METAL_FUNC uint shift_left(uint v, uint zero) {
  static_assert(S >= 1 && S <= 8, "two steps");
  if constexpr (S <= 4) {
    return zero + (v << S);
  } else {
    const uint step = zero + (v << 4);
    return (step & zero) + (step << (S - 4));
  }
}

// Everything below is a template over H, the bits per weight times two: a lane's weights take 4 * H bits of the stream.
//
// 16-bit pieces of the stream that a lane's windows touch: one before its own bits, then those that hold its own bits.
// Own bits begin inside a piece where 4 * H is no multiple of 16.
template <int H>
struct LaneCodes {
  static constant constexpr const int offset = H % 4 == 0 ? 0 : H % 2 == 0 ? 8 : 12;  // of the own bits, at most
  static constant constexpr const int size = 1 + (4 * H + offset + 15) / 16;
  ushort piece[size];
};

// Where a lane's pieces lie, counted from the codes of an expert: offsets of 32 bits, to which a load adds its base by
// itself. A pointer that moves would be an addition of 64 bits for every load, which takes 4 clocks (M1, M2). They reach
// over 8 GB, more than an array may have. The stream's 16-bit pieces lie swapped in each 32-bit word.
template <int H>
struct LanePlaces {
  // Own bits are whole words at K = 4 and pairs of them at K = 8.
  static constant constexpr const uint unit = H == 8 ? 2 : H == 16 ? 4 : 1;
  static constant constexpr const int loads = unit == 1 ? LaneCodes<H>::size - 1 : 1;
  uint before;      // the piece before the lane's own bits
  uint own[loads];  // in units

  METAL_FUNC void move(uint tiles) thread {
    before += tiles * (8 * H);
    MARLIN_UNROLL
    for (int i = 0; i < loads; ++i) {
      own[i] += tiles * (8 * H / unit);
    }
  }
};

// In tile `tiles`. The first piece of lane 0 is the tile's last.
template <int H>
METAL_FUNC LanePlaces<H> find_places(uint tiles, ushort lane) {
  constexpr ushort last = 8 * H - 1;
  LanePlaces<H> places;
  const ushort first = ushort(lane * H) >> 2;
  places.before = (first == 0 ? last : first - 1) ^ 1;
  if constexpr (LanePlaces<H>::unit != 1) {
    places.own[0] = lane;
  } else {
    MARLIN_UNROLL
    for (int i = 0; i < LanePlaces<H>::loads; ++i) {
      // At half rates the bits of the last lane may end before its last piece, which is then any: no load depends on a
      // condition.
      const ushort at = first + i;
      places.own[i] = (H % 2 == 0 ? at : min(at, last)) ^ 1;
    }
  }
  places.move(tiles);
  return places;
}

template <int H>
METAL_FUNC LaneCodes<H> load_codes(device const ushort* stream, const thread LanePlaces<H>& places) {
  LaneCodes<H> codes;
  codes.piece[0] = stream[places.before];
  if constexpr (H == 8) {
    const ushort2 word = as_type<ushort2>(((device const uint*)stream)[places.own[0]]);
    codes.piece[1] = word.y;
    codes.piece[2] = word.x;
  } else if constexpr (H == 16) {
    const uint2 words = ((device const uint2*)stream)[places.own[0]];
    const ushort2 a = as_type<ushort2>(words.x);
    const ushort2 b = as_type<ushort2>(words.y);
    codes.piece[1] = a.y;
    codes.piece[2] = a.x;
    codes.piece[3] = b.y;
    codes.piece[4] = b.x;
  } else {
    MARLIN_UNROLL
    for (int i = 0; i < LanePlaces<H>::loads; ++i) {
      codes.piece[i + 1] = stream[places.own[i]];
    }
  }
  return codes;
}

METAL_FUNC uint join(ushort high, ushort low) {
  return as_type<uint>(ushort2(low, high));
}

// Moves a lane's own bits to the beginning of a piece by a multiplication, which takes as long as a shift by a constant.
// The factor is 16^j where they begin j * 4 bits in it: for odd K 1 in even lanes and 256 in odd ones, at half rates one
// of four. As the compiler does not know the factors, it cannot make a shift by a register amount of it, which takes
// twice as long.
template <int H>
METAL_FUNC uint align_factor(ushort lane, uint zero) {
  const ushort j = ushort(lane * H) & 3;
  const uint even = j & 2 ? 256 : 1 + zero;
  return H % 2 == 0 ? even : j & 1 ? (j & 2 ? 4096 : 16) : even;
}

template <int H>
METAL_FUNC void align_codes(thread LaneCodes<H>& codes, uint factor) {
  MARLIN_UNROLL
  for (int i = 0; i + 1 < LaneCodes<H>::size; ++i) {
    const ushort2 aligned = as_type<ushort2>(join(codes.piece[i], codes.piece[i + 1]) * factor);
    codes.piece[i] = aligned.y;
    if (i + 2 == LaneCodes<H>::size) {
      codes.piece[i + 1] = aligned.x;
    }
  }
}

// The value of a 16-bit state, rounded to half as the format says.
//
// MUL1 needs s, the sum of the four bytes of x, here without a shift to the right. The halves of x add up to
// 256 * (b3 + b1) + (b2 + b0), and with the odd bytes set to 0xFF to (b2 + b0) + 0x1FE00: the first plus 255 times the
// second is 256 s + 255 * 0x1FE00, one multiply-add. 16 times that is 0x1FC02000 + 4096 s, the bits of the float
// 2^-75 * (3074 + s): s is at most 1020, and the exponent changes at 4096. Every value fits in 24 bits, so that fma is
// exact and only the conversion rounds.
template <int Codebook>
METAL_FUNC half codebook_value(ushort state) {
  if constexpr (Codebook == MARLIN_CODEBOOK_MUL1) {
    constexpr float step = MARLIN_MUL1_SCALE;  // the value is (1024 + s) * step + bias
    constexpr float bias = MARLIN_MUL1_OFFSET;
    const uint x = uint(state) * MARLIN_MUL1_MULTIPLIER;
    const ushort2 halves = as_type<ushort2>(x);
    const ushort2 even = as_type<ushort2>(x | 0xFF00FF00u);
    const uint sum = (uint(even.x) + even.y) * 4080 + ((uint(halves.x) + halves.y) << 4);
    return half(fma(as_type<float>(sum), step * 0x1p75f, bias - (3074 - 1024) * step));
  } else {
    uint x = uint(state) * (Codebook == MARLIN_CODEBOOK_MCG ? MARLIN_MCG_MULTIPLIER : MARLIN_3INST_MULTIPLIER);
    x += Codebook == MARLIN_CODEBOOK_MCG ? 0u : MARLIN_3INST_INCREMENT;
    x = (x & MARLIN_HALVES_MASK) ^ MARLIN_HALVES_XOR;
    const half2 terms = as_type<half2>(x);
    return terms.x + terms.y;
  }
}

struct LaneWeights {
  half value[kLaneWeights];
};

// Window c of a lane ends at bit (c + 1) * H / 2, rounded down, of its own bits: it is the top half of two joined pieces
// shifted left by 1 to 16. Windows of the same pieces are reached by walking; a shift by 16 is the low piece.
template <int H, int Codebook, int C>
METAL_FUNC void decode_window(thread LaneWeights& weights, const thread LaneCodes<H>& codes, uint walked, uint zero) {
  if constexpr (C < kLaneWeights) {
    constexpr int end = (C + 1) * H / 2;
    constexpr int previous_end = C * H / 2;
    constexpr int piece = (end - 1) / 16;
    constexpr int shift = end - 16 * piece;
    constexpr bool same_pieces = C > 0 && (previous_end - 1) / 16 == piece;
    constexpr int walked_by = same_pieces ? previous_end - 16 * piece : 0;
    ushort state;
    if constexpr (shift == 16) {
      state = codes.piece[piece + 1];
    } else {
      const uint pair = same_pieces ? walked : join(codes.piece[piece], codes.piece[piece + 1]);
      walked = shift_left<shift - walked_by>(pair, zero);
      state = as_type<ushort2>(walked).y;
    }
    weights.value[C] = codebook_value<Codebook>(state);
    decode_window<H, Codebook, C + 1>(weights, codes, walked, zero);
  }
}

// The eight weights that a lane holds of a tile. `stream`: the codes that places are counted from, or a tile further on.
template <int H, int Codebook>
METAL_FUNC LaneWeights
decode_lane(device const ushort* stream, const thread LanePlaces<H>& places, ushort lane, uint zero) {
  LaneCodes<H> codes = load_codes<H>(stream, places);
  if constexpr (LaneCodes<H>::offset != 0) {
    align_codes<H>(codes, align_factor<H>(lane, zero));
  }
  LaneWeights weights;
  decode_window<H, Codebook, 0>(weights, codes, 0, zero);
  return weights;
}

// Calls body.template run<H, Codebook>() for a format word. Only decoders for Widths and Codebooks are compiled; with
// one of each nothing is compared at run time.
template <int H, uint Codebooks, int Codebook, typename Body>
METAL_FUNC void for_codebook(thread Body& body, uint format) {
  if constexpr (Codebook <= MARLIN_CODEBOOK_MUL1) {
    constexpr uint bit = 1u << Codebook;
    if constexpr ((Codebooks & bit) == 0) {
      for_codebook<H, Codebooks, Codebook + 1>(body, format);
    } else if constexpr (Codebooks == bit) {
      body.template run<H, Codebook>();
    } else if (MARLIN_FORMAT_CODEBOOK(format) == Codebook) {
      body.template run<H, Codebook>();
    } else {
      for_codebook<H, Codebooks, Codebook + 1>(body, format);
    }
  }
}

template <uint Widths, uint Codebooks, int H, typename Body>
METAL_FUNC void for_width(thread Body& body, uint format) {
  if constexpr (H <= 2 * MARLIN_MAX_BITS) {
    constexpr uint bit = 1u << H;
    // Half rates exist for one codebook.
    constexpr uint codebooks = H % 2 == 0 ? Codebooks : 1u << MARLIN_CODEBOOK_MUL1;
    if constexpr ((Widths & bit) == 0) {
      for_width<Widths, Codebooks, H + 1>(body, format);
    } else if constexpr (Widths == bit) {
      for_codebook<H, codebooks, 0>(body, format);
    } else if (MARLIN_FORMAT_HALF_BITS(format) == H) {
      for_codebook<H, codebooks, 0>(body, format);
    } else {
      for_width<Widths, Codebooks, H + 1>(body, format);
    }
  }
}

template <uint Widths, uint Codebooks, typename Body>
METAL_FUNC void for_format(thread Body& body, uint format) {
  for_width<Widths, Codebooks, 2>(body, format);
}
