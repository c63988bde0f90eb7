// The ops and their primitives. Inputs are checked in full by python/mlx_marlin/ops; what is checked here is what
// memory safety rests on (the experts of a layer) and what only the evaluation can know: contiguity and the values of
// the indices.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// x [..., in] -> [..., out]. With ids [...]: [..., out] of their shape, and each row of x serves as many
// consecutive ids as there are per row.
mx::array trellis_linear(
    const mx::array& x, const std::optional<mx::array>& ids, const std::vector<mx::array>& stack,
    const LinearCall& call, mx::StreamOrDevice s);

// x [..., hidden], indices [..., k] -> [..., k, hidden], or [..., hidden] with scores [..., k].
mx::array trellis_swiglu(
    const mx::array& x, const mx::array& indices, const std::optional<mx::array>& scores,
    const std::vector<mx::array>& bank, const SwigluCall& call, mx::StreamOrDevice s);

// The inner matrix of one expert: float16 [k, n].
mx::array trellis_decode(const std::vector<mx::array>& stack, const DecodeCall& call, mx::StreamOrDevice s);

// Shared by the primitives: no forward-mode or vectorising transform, one comparable call, one output.
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
