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
 public:
  using TrellisPrimitive::TrellisPrimitive;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  const char* name() const override {
    return "TrellisLinear";
  }
};

}  // namespace mlx_marlin
