// What the primitives share. Inputs are checked in full by python/mlx_marlin/ops; what is checked here is what memory
// safety rests on (the experts of a layer) and what only the evaluation can know: contiguity and the values of the
// indices.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// No forward-mode or vectorising transform, one comparable call, one output.
template <class Call>
class TrellisPrimitive : public mx::UnaryPrimitive {
 public:
  TrellisPrimitive(mx::Stream stream, const Call& call) : UnaryPrimitive(stream), call_(call) {}

  std::vector<mx::array> jvp(
      const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&) override {
    throw std::invalid_argument(
        std::string("[") + name() + "] jvp is not supported; use vjp (mx.grad, mx.vjp) with respect to x or scores.");
  }

  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>&, const std::vector<int>&) override {
    throw std::invalid_argument(
        std::string("[") + name() + "] vmap is not supported; pass the batch as leading dimensions of x.");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return call_ == static_cast<const TrellisPrimitive&>(other).call_;
  }

 protected:
  Call call_;
};

// What every primitive of ours declares, as MLX's macros do for its own (mlx/primitives.h, DEFINE_NAME).
#define MARLIN_PRIMITIVE(NAME)                                                          \
 public:                                                                                \
  using TrellisPrimitive::TrellisPrimitive;                                             \
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;         \
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;         \
  std::vector<mx::array> vjp(                                                           \
      const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,  \
      const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override; \
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;  \
  const char* name() const override {                                                   \
    return #NAME;                                                                       \
  }

}  // namespace mlx_marlin
