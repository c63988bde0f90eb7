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

// Inputs: x, indices, stack arrays of gate, up and down, scores if combined.
class TrellisSwiglu : public TrellisPrimitive<SwigluCall> {
 public:
  using TrellisPrimitive::TrellisPrimitive;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override {
    return "TrellisSwiglu";
  }
};

}  // namespace mlx_marlin
