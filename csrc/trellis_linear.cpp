#include "trellis.h"

#include "metal/encode.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "trellis_cpu.h"

namespace mlx_marlin {

namespace {

mx::Shape linear_shape(const mx::array& x, const LinearCall& call) {
  if (call.gathered) {
    return {static_cast<mx::ShapeElem>(x.size() / call.x_size() * call.x_divisor), call.y_size()};
  }
  mx::Shape shape = x.shape();
  shape.back() = call.y_size();
  return shape;
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
  return mx::array(linear_shape(x, call), x.dtype(), std::make_shared<TrellisLinear>(stream, call), std::move(inputs));
}

void TrellisLinear::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  require_contiguous("trellis_linear", inputs);
  const mx::array& x = inputs[0];
  cpu::ProductArgs args{
      cpu_dtype(x.dtype()),
      x.data<void>(),
      out.data<void>(),
      static_cast<int64_t>(out.size() / call_.y_size()),
      call_.gathered ? inputs.back().data<uint32_t>() : nullptr,
      call_.x_divisor,
      call_.in_features,
      call_.out_features,
      call_.transposed,
      cpu_stack(call_.stack, inputs, 1)};
  mx::cpu::get_command_encoder(stream()).dispatch([args, config = cpu_config(call_.config)] {
    if (args.ids) {
      require_ids("trellis_linear", args.ids, args.rows, args.stack.experts);
    }
    cpu::product(args, config);
  });
}

void TrellisLinear::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  metal::encode_linear(call_, stream(), inputs, out);
}

std::vector<mx::Shape> TrellisLinear::output_shapes(const std::vector<mx::array>& inputs) {
  return {linear_shape(inputs[0], call_)};
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
  call.x_divisor = 1;
  call.stack.bias = false;
  const std::vector<mx::array> stack(primals.begin() + 1, primals.begin() + 6);
  const auto ids = call_.gathered ? std::optional(primals.back()) : std::nullopt;
  mx::array grad = trellis_linear(cotangents[0], ids, stack, call, stream());
  if (call_.x_divisor > 1) {
    grad = mx::sum(mx::reshape(grad, {-1, call_.x_divisor, call_.x_size()}, stream()), 1, false, stream());
  }
  return {mx::reshape(grad, primals[0].shape(), stream())};
}

}  // namespace mlx_marlin
