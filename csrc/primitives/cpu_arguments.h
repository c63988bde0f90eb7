// From MLX arrays to the plain pointers of the CPU kernels.
#pragma once

#include <cstddef>
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
  return {config.tile_size_m, config.tile_size_n, config.simdgroups, !config.use_fp32_acc};
}

// The stack whose arrays begin at inputs[first].
inline cpu::Stack cpu_stack(const StackInfo& info, const std::vector<mx::array>& inputs, size_t first) {
  return {
      .codes = inputs[first].data<uint32_t>(),
      .offsets = inputs[first + 1].data<int64_t>(),
      .formats = inputs[first + 2].data<uint32_t>(),
      .suh = reinterpret_cast<const uint16_t*>(inputs[first + 3].data<mx::float16_t>()),
      .svh = reinterpret_cast<const uint16_t*>(inputs[first + 4].data<mx::float16_t>()),
      .bias = info.bias ? inputs[first + 5].data<float>() : nullptr,
      .experts = info.experts,
      .k = info.k,
      .n = info.n};
}

}  // namespace mlx_marlin
