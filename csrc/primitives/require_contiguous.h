// The kernels read dense rows.
#pragma once

#include <string>
#include <vector>

#include "mlx/array.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// Throws std::invalid_argument where an input is not row contiguous. The ops make x, ids and scores contiguous; weights
// are expected to be.
void require_contiguous(const std::string& op, const std::vector<mx::array>& inputs);

}  // namespace mlx_marlin
