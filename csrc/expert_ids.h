// Expert indices: refused as soon as they are known to be out of range.
#pragma once

#include <cstdint>
#include <string>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// The indices as the kernels take them: uint32, outside of every gradient. Throws std::invalid_argument where one
// is out of [0, experts) and known by now; never waits for an array.
mx::array expert_ids(const std::string& op, const mx::array& indices, int experts, mx::StreamOrDevice s);

// The same refusal at evaluation, of indices that were not known before.
void require_ids(const std::string& op, const uint32_t* ids, int64_t count, int experts);

}  // namespace mlx_marlin
