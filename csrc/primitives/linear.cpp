#include "primitives/linear.h"

#include "metal/encode.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "primitives/cpu_arguments.h"
#include "primitives/expert_ids.h"
#include "primitives/require_contiguous.h"

namespace mlx_marlin {

namespace {

// leading: x, or the ids where they are given.
mx::Shape linear_shape(const mx::array& leading, const LinearCall& call) {
  mx::Shape shape = leading.shape();
  if (call.gathered) {
    shape.push_back(call.y_size());
  } else {
    shape.back() = call.y_size();
  }
  return shape;
}

// The call with what the sizes of its inputs say: how many ids share one row of x.
LinearCall sized(const LinearCall& call, const mx::array& x, const mx::array& ids) {
  LinearCall out = call;
  const auto x_rows = static_cast<int64_t>(x.size()) / call.x_size();
  const auto slots = static_cast<int64_t>(ids.size());
  out.x_divisor = call.gathered && x_rows > 0 && slots > 0 ? static_cast<int>(slots / x_rows) : 1;
  return out;
}

}  // namespace

mx::array trellis_linear(
    const mx::array& x, const std::optional<mx::array>& ids, const std::vector<mx::array>& stack,
    const LinearCall& call, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  std::vector<mx::array> inputs = {mx::contiguous(x, false, stream)};
  inputs.insert(inputs.end(), stack.begin(), stack.end());
  if (ids) {
    inputs.push_back(mx::contiguous(*ids, false, stream));
  }
  return mx::array(
      linear_shape(ids.value_or(x), call), x.dtype(), std::make_shared<TrellisLinear>(stream, call), std::move(inputs));
}

void TrellisLinear::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  require_contiguous("trellis_linear", inputs);
  const mx::array& x = inputs[0];
  const LinearCall call = sized(call_, x, inputs.back());
  const cpu::ProductArgs args{
      .dtype = cpu_dtype(x.dtype()),
      .x = x.data<void>(),
      .y = out.data<void>(),
      .rows = static_cast<int64_t>(out.size() / call.y_size()),
      .ids = call.gathered ? inputs.back().data<uint32_t>() : nullptr,
      .x_divisor = call.x_divisor,
      .in_features = call.in_features,
      .out_features = call.out_features,
      .transposed = call.transposed,
      .stack = cpu_stack(call.stack, inputs, 1)};
  const auto size = static_cast<int64_t>(out.size());
  mx::cpu::get_command_encoder(stream()).dispatch([args, size, config = cpu_config(call.config)] {
    if (args.ids) {
      require_ids_or_nan("trellis_linear", args.ids, args.rows, args.stack.experts, args.dtype, args.y, size);
    }
    cpu::product(args, config);
  });
}

void TrellisLinear::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  require_contiguous("trellis_linear", inputs);
  metal::encode_linear(sized(call_, inputs[0], inputs.back()), stream(), inputs, out);
}

std::vector<mx::Shape> TrellisLinear::output_shapes(const std::vector<mx::array>& inputs) {
  return {linear_shape(call_.gathered ? inputs.back() : inputs[0], call_)};
}

// x -> x W is linear, so its vjp is the product with W^T (or back), with the bias dropped. Rows that
// shared one row of x add up.
std::vector<mx::array> TrellisLinear::vjp(
    const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  if (argnums.size() != 1 || argnums[0] != 0) {
    throw std::invalid_argument(
        "[trellis_linear] the gradient is defined with respect to x only; freeze the trellis weights.");
  }
  LinearCall call = call_;
  call.transposed = !call_.transposed;
  call.stack.bias = false;
  const std::vector<mx::array> stack(primals.begin() + 1, primals.begin() + 6);
  const auto ids = call_.gathered ? std::optional(primals.back()) : std::nullopt;
  mx::array grad = trellis_linear(cotangents[0], ids, stack, call, stream());
  const int divisor = sized(call_, primals[0], primals.back()).x_divisor;
  if (divisor > 1) {
    grad = mx::sum(mx::reshape(grad, {-1, divisor, call_.x_size()}, stream()), 1, false, stream());
  }
  return {mx::reshape(grad, primals[0].shape(), stream())};
}

}  // namespace mlx_marlin
