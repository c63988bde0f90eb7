// The product with trellis weights.
#pragma once

#include <optional>
#include <vector>

#include "call.h"
#include "mlx/array.h"
#include "mlx/utils.h"
#include "primitives/primitive.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// x [..., in] -> [..., out]. With ids [...]: [..., out] of their shape, and each row of x serves as many
// consecutive ids as there are per row.
mx::array trellis_linear(
    const mx::array& x, const std::optional<mx::array>& ids, const std::vector<mx::array>& stack,
    const LinearCall& call, mx::StreamOrDevice s);

// Inputs: x, stack arrays, ids if gathered.
class TrellisLinear : public TrellisPrimitive<LinearCall> {
  MARLIN_PRIMITIVE(TrellisLinear)
};

}  // namespace mlx_marlin
