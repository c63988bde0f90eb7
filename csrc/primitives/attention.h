// Attention on the CPU: what MLX composes of a matrix product, a softmax and another product.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "call.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// queries [B, Nq, Tq, D], keys [B, Nkv, Tkv, D], values [B, Nkv, Tkv, Dv], of one dtype; mask: bool or float32, broadcast to
// [B, Nq, Tq, Tkv]; sinks: float32 [Nq] -> [B, Nq, Tq, Dv]. Tkv > 0; the stream is a CPU's.
mx::array cpu_attention(
    const mx::array& queries, const mx::array& keys, const mx::array& values, const std::optional<mx::array>& mask,
    const std::optional<mx::array>& sinks, float scale, bool causal, mx::StreamOrDevice s);

// Inputs: queries, keys, values, and the mask and the sinks where they are given. Every transform is that of
// mx::fast::scaled_dot_product_attention, which computes the same.
class CpuAttention : public mx::UnaryPrimitive {
 public:
  CpuAttention(mx::Stream stream, const AttentionCall& call) : UnaryPrimitive(stream), call_(call) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs, const std::vector<int>& axes) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override {
    return "CpuAttention";
  }

 private:
  AttentionCall call_;
};

}  // namespace mlx_marlin
