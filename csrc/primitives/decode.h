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
 public:
  using TrellisPrimitive::TrellisPrimitive;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override {
    return "TrellisDecode";
  }
};

}  // namespace mlx_marlin
