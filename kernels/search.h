// The trellis as the encoder's search walks it: what its two kernels share.
#pragma once

#include "common.h"

// A cost above that of any path, 256 * 65536^2, in the place of infinity, which compilers may take for impossible. What
// a step adds to it is lost in rounding.
static constant constexpr const float kUnreachable = 1e30f;

// Bits that position t adds to the stream at H half bits per weight.
METAL_FUNC constexpr int fresh_bits(int H, int t) {
  return (t + 1) * H / 2 - t * H / 2;
}
