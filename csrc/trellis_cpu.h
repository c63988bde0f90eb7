// From MLX arrays to the plain pointers of the CPU kernels.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"
#include "cpu/kernels.h"
#include "expert_ids.h"
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
  constexpr uint32_t kHalfRates = 0xAAAAAAAA;
  if (info.widths & kHalfRates) {
    throw std::invalid_argument("the CPU kernels decode whole widths only, but a weight has 1.5, 2.5 or 3.5 bits.");
  }
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

// Refuses indices that are out of range, and leaves NaN rather than uninitialised memory in the result: MLX lets it
// be read after the error.
inline void require_ids_or_nan(
    const char* op, const uint32_t* ids, int64_t count, int experts, cpu::DType dtype, void* out, int64_t size) {
  try {
    require_ids(op, ids, count, experts);
  } catch (...) {
    if (dtype == cpu::DType::float32) {
      std::fill_n(static_cast<float*>(out), size, std::numeric_limits<float>::quiet_NaN());
    } else {
      constexpr uint16_t kHalfNan = 0x7e00, kBfloatNan = 0x7fc0;
      std::fill_n(static_cast<uint16_t*>(out), size, dtype == cpu::DType::float16 ? kHalfNan : kBfloatNan);
    }
    throw;
  }
}

}  // namespace mlx_marlin
