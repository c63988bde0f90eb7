// The fused experts of a layer.
#pragma once

#include <optional>
#include <vector>

#include "call.h"
#include "mlx/array.h"
#include "mlx/utils.h"
#include "primitives/primitive.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// x [..., hidden], indices [..., k] -> [..., k, hidden], or [..., hidden] with scores [..., k].
mx::array trellis_swiglu(
    const mx::array& x, const mx::array& indices, const std::optional<mx::array>& scores,
    const std::vector<mx::array>& bank, const SwigluCall& call, mx::StreamOrDevice s);

// Inputs: x, indices, stack arrays of gate if there is one, up and down, scores if combined.
class TrellisSwiglu : public TrellisPrimitive<SwigluCall> {
  MARLIN_PRIMITIVE(TrellisSwiglu)
};

}  // namespace mlx_marlin
