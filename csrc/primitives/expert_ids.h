// Expert indices: refused as soon as they are known to be out of range.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/kernels.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// The indices as the kernels take them: uint32, outside of every gradient. Throws std::invalid_argument where one
// is out of [0, experts) and known by now; never waits for an array.
mx::array expert_ids(const std::string& op, const mx::array& indices, int experts, mx::StreamOrDevice s);

// The same refusal at evaluation, of indices that were not known before. It leaves NaN rather than uninitialised memory
// in the result: MLX lets it be read after the error.
void require_ids_or_nan(
    const std::string& op, const uint32_t* ids, int64_t count, int experts, cpu::DType dtype, void* out, int64_t size);

}  // namespace mlx_marlin
