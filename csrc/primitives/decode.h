// The decoder by itself.
#pragma once

#include <vector>

#include "call.h"
#include "mlx/array.h"
#include "mlx/utils.h"
#include "primitives/primitive.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// The inner matrix of one expert: float16 [k, n].
mx::array trellis_decode(const std::vector<mx::array>& stack, const DecodeCall& call, mx::StreamOrDevice s);

// Inputs: stack arrays.
class TrellisDecode : public TrellisPrimitive<DecodeCall> {
  MARLIN_PRIMITIVE(TrellisDecode)
};

}  // namespace mlx_marlin
