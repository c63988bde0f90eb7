#include "primitives/attention.h"

#include <functional>
#include <stdexcept>

#include "cpu/pool.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "primitives/cpu_arguments.h"

namespace mlx_marlin {

namespace {

using Function = std::function<std::vector<mx::array>(const std::vector<mx::array>&)>;

mx::Shape attention_shape(const mx::array& queries, const mx::array& values) {
  mx::Shape shape = queries.shape();
  shape.back() = values.shape(-1);
  return shape;
}

// A view of four dimensions; the dimensions that are broadcast have a stride of zero.
cpu::Heads heads(const mx::array& a) {
  return {a.data<void>(), {a.strides(0), a.strides(1), a.strides(2), a.strides(3)}};
}

// MLX's own attention, of the same inputs.
Function composed(const AttentionCall& call, mx::Stream stream) {
  return [call, stream](const std::vector<mx::array>& inputs) {
    std::optional<mx::array> mask, sinks;
    if (call.masked) {
      mask = mx::issubdtype(inputs[3].dtype(), mx::floating) ? mx::astype(inputs[3], inputs[0].dtype(), stream)
                                                             : inputs[3];
    }
    if (call.sinks) {
      sinks = mx::astype(inputs.back(), inputs[0].dtype(), stream);
    }
    const char* mode = call.causal ? "causal" : call.masked ? "array" : "";
    return std::vector<mx::array>{mx::fast::scaled_dot_product_attention(
        inputs[0], inputs[1], inputs[2], call.scale, mode, mask, sinks, false, stream)};
  };
}

// composed(), of the inputs at `argnums` alone.
Function composed_of(
    const AttentionCall& call, mx::Stream stream, const std::vector<mx::array>& primals,
    const std::vector<int>& argnums) {
  return [call, stream, primals, argnums](const std::vector<mx::array>& some) {
    std::vector<mx::array> inputs = primals;
    for (size_t i = 0; i < argnums.size(); ++i) {
      inputs[argnums[i]] = some[i];
    }
    return composed(call, stream)(inputs);
  };
}

std::vector<mx::array> chosen(const std::vector<mx::array>& primals, const std::vector<int>& argnums) {
  std::vector<mx::array> some;
  for (int i : argnums) {
    some.push_back(primals[i]);
  }
  return some;
}

}  // namespace

mx::array cpu_attention(
    const mx::array& queries, const mx::array& keys, const mx::array& values, const std::optional<mx::array>& mask,
    const std::optional<mx::array>& sinks, float scale, bool causal, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  std::vector<mx::array> inputs = {queries, keys, values};
  if (mask) {
    const mx::Shape scores = {queries.shape(0), queries.shape(1), queries.shape(2), keys.shape(2)};
    inputs.push_back(mx::broadcast_to(*mask, scores, stream));
  }
  if (sinks) {
    inputs.push_back(mx::contiguous(*sinks, false, stream));
  }
  const AttentionCall call{.scale = scale, .causal = causal, .masked = mask.has_value(), .sinks = sinks.has_value()};
  return mx::array(
      attention_shape(queries, values), queries.dtype(), std::make_shared<CpuAttention>(stream, call),
      std::move(inputs));
}

void CpuAttention::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  const mx::array &queries = inputs[0], &keys = inputs[1];
  const cpu::AttentionArgs args{
      .dtype = cpu_dtype(queries.dtype()),
      .queries = heads(queries),
      .keys = heads(keys),
      .values = heads(inputs[2]),
      .mask = call_.masked ? heads(inputs[3]) : cpu::Heads{},
      .mask_is_bool = call_.masked && inputs[3].dtype() == mx::bool_,
      .causal = call_.causal,
      .sinks = call_.sinks ? inputs.back().data<float>() : nullptr,
      .out = out.data<void>(),
      .batches = queries.shape(0),
      .heads = keys.shape(1),
      .repeats = queries.shape(1) / keys.shape(1),
      .query_count = queries.shape(2),
      .key_count = keys.shape(2),
      .key_size = keys.shape(3),
      .value_size = inputs[2].shape(3),
      .scale = call_.scale};
  mx::cpu::get_command_encoder(stream()).dispatch([args] { cpu::attention(args, cpu::threads()); });
}

void CpuAttention::eval_gpu(const std::vector<mx::array>&, mx::array&) {
  throw std::invalid_argument("[cpu_attention] runs on the CPU; use mx.fast.scaled_dot_product_attention on a GPU.");
}

std::vector<mx::array> CpuAttention::vjp(
    const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  return mx::vjp(composed_of(call_, stream(), primals, argnums), chosen(primals, argnums), cotangents).second;
}

std::vector<mx::array> CpuAttention::jvp(
    const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents, const std::vector<int>& argnums) {
  return mx::jvp(composed_of(call_, stream(), primals, argnums), chosen(primals, argnums), tangents).second;
}

std::pair<std::vector<mx::array>, std::vector<int>> CpuAttention::vmap(
    const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
  return {mx::vmap(composed(call_, stream()), axes)(inputs), {0}};
}

std::vector<mx::Shape> CpuAttention::output_shapes(const std::vector<mx::array>& inputs) {
  return {attention_shape(inputs[0], inputs[2])};
}

bool CpuAttention::is_equivalent(const mx::Primitive& other) const {
  return call_ == static_cast<const CpuAttention&>(other).call_;
}

}  // namespace mlx_marlin
