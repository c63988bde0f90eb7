// The encoder's search, for GPUs above all: on the CPU it is a function of NumPy arrays too.
#pragma once

#include <vector>

#include "call.h"
#include "mlx/array.h"
#include "mlx/utils.h"
#include "primitives/primitive.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// tiles: float32 [count, 256], multiples of 2^-24 as halves are; values: float16 [65536], of all states of the codebook.
// uint16 [count, 256], the states.
mx::array trellis_viterbi(
    const mx::array& tiles, const mx::array& values, const ViterbiCall& call, mx::StreamOrDevice s);

// Inputs: tiles, values.
class TrellisViterbi : public TrellisPrimitive<ViterbiCall> {
  MARLIN_PRIMITIVE(TrellisViterbi)
};

}  // namespace mlx_marlin
