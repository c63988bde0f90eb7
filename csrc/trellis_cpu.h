// From MLX arrays to the plain pointers of the CPU kernels.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"
#include "cpu/kernels.h"
#include "mlx/array.h"

namespace mlx_marlin {

namespace mx = mlx::core;

inline cpu::DType cpu_dtype(mx::Dtype dtype) {
  return dtype == mx::float32 ? cpu::DType::float32 : dtype == mx::float16 ? cpu::DType::float16 : cpu::DType::bfloat16;
}

inline cpu::Config cpu_config(const KernelConfig& config) {
  return {config.tile_size_m, config.tile_size_n, config.simdgroups};
}

// The kernels read dense rows. The ops make x, ids and scores contiguous; weights are expected to be.
inline void require_contiguous(const char* op, const std::vector<mx::array>& inputs) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].flags().row_contiguous) {
      throw std::invalid_argument(
          std::string("[") + op + "] input " + std::to_string(i) +
          " is not row contiguous; pass weights through mx.contiguous first.");
    }
  }
}

// The stack whose arrays begin at inputs[first].
inline cpu::Stack cpu_stack(const StackInfo& info, const std::vector<mx::array>& inputs, size_t first) {
  return {
      inputs[first].data<uint32_t>(),
      inputs[first + 1].data<int64_t>(),
      inputs[first + 2].data<uint32_t>(),
      reinterpret_cast<const uint16_t*>(inputs[first + 3].data<mx::float16_t>()),
      reinterpret_cast<const uint16_t*>(inputs[first + 4].data<mx::float16_t>()),
      info.bias ? inputs[first + 5].data<float>() : nullptr,
      info.experts,
      info.k,
      info.n};
}

inline void require_ids(const char* op, const uint32_t* ids, int64_t count, int experts) {
  const int64_t bad = cpu::find_bad_id(ids, count, experts);
  if (bad >= 0) {
    throw std::invalid_argument(
        std::string("[") + op + "] expert index " + std::to_string(static_cast<int32_t>(ids[bad])) + " at position " +
        std::to_string(bad) + " is out of range: the layer has " + std::to_string(experts) + " experts.");
  }
}

}  // namespace mlx_marlin
