#include "primitives/swiglu.h"

#include "format.h"
#include "metal/encode.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "primitives/cpu_arguments.h"
#include "primitives/expert_ids.h"
#include "primitives/linear.h"
#include "primitives/require_contiguous.h"

namespace mlx_marlin {

namespace {

mx::Shape swiglu_shape(const mx::array& indices, const SwigluCall& call) {
  mx::Shape shape = indices.shape();
  if (call.combine) {
    shape.back() = call.hidden;
  } else {
    shape.push_back(call.hidden);
  }
  return shape;
}

// gate, up -> activation, in MLX ops: what the vjp differentiates. The same formulas as cpu/activation.
mx::array activate(const mx::array& gate, const mx::array& up, const SwigluCall& call, mx::Stream s) {
  const auto f32 = [](float value) { return mx::array(value, mx::float32); };
  switch (call.activation) {
    case MARLIN_ACTIVATION_SILU:
      return mx::multiply(mx::multiply(gate, mx::sigmoid(gate, s), s), up, s);
    case MARLIN_ACTIVATION_GELU_TANH: {
      // 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))), Hendrycks and Gimpel, 2016.
      const mx::array cube = mx::multiply(mx::multiply(gate, gate, s), gate, s);
      const mx::array inner =
          mx::multiply(f32(0.7978845608f), mx::add(gate, mx::multiply(f32(0.044715f), cube, s), s), s);
      const mx::array gelu =
          mx::multiply(mx::multiply(f32(0.5f), gate, s), mx::add(f32(1.0f), mx::tanh(inner, s), s), s);
      return mx::multiply(gelu, up, s);
    }
    default: {
      // gpt-oss: gate clamped above, up on both sides, (up + 1) gate sigmoid(alpha gate).
      const mx::array g = mx::minimum(gate, f32(call.limit), s);
      const mx::array u = mx::clip(up, f32(-call.limit), f32(call.limit), s);
      const mx::array swish = mx::multiply(g, mx::sigmoid(mx::multiply(f32(call.alpha), g, s), s), s);
      return mx::multiply(swish, mx::add(u, f32(1.0f), s), s);
    }
  }
}

// The three gathered products that a fused call stands for, used by its vjp: float32 between them.
struct Slots {
  const SwigluCall& call;
  const std::vector<mx::array>& primals;
  mx::array ids;  // [rows * top_k]
  mx::Stream stream;

  mx::array product(
      const mx::array& x, const StackInfo& info, size_t first, int in_features, int out_features,
      bool transposed) const {
    LinearCall linear{
        .in_features = in_features,
        .out_features = out_features,
        .x_divisor = 1,
        .gathered = true,
        .transposed = transposed,
        .stack = info,
        .config = call.config};
    linear.stack.bias = info.bias && !transposed;
    const auto begin = primals.begin() + static_cast<std::ptrdiff_t>(first);
    const std::vector<mx::array> stack(begin, begin + linear.stack.num_arrays());
    return trellis_linear(x, ids, stack, linear, stream);
  }

  size_t gate_first() const {
    return 2;
  }
  size_t up_first() const {
    return gate_first() + static_cast<size_t>(call.gate.num_arrays());
  }
  size_t down_first() const {
    return up_first() + static_cast<size_t>(call.up.num_arrays());
  }
};

std::string describe(const StackInfo& info) {
  return std::to_string(info.experts) + " of [" + std::to_string(info.k) + ", " + std::to_string(info.n) + "]";
}

// One index serves all three projections, and the width of gate and up flows into down.
void require_one_layer(const SwigluCall& call) {
  const StackInfo &gate = call.gate, &up = call.up, &down = call.down;
  const bool experts = gate.experts == up.experts && gate.experts == down.experts;
  if (!experts || gate.k != up.k || gate.n != up.n || down.k != gate.n || down.n != gate.k) {
    throw std::invalid_argument(
        "[trellis_swiglu] gate, up and down must have the same experts, up the sizes of gate, and down its sizes "
        "exchanged; got gate " +
        describe(gate) + ", up " + describe(up) + ", down " + describe(down) + ".");
  }
}

}  // namespace

mx::array trellis_swiglu(
    const mx::array& x, const mx::array& indices, const std::optional<mx::array>& scores,
    const std::vector<mx::array>& bank, const SwigluCall& call, mx::StreamOrDevice s) {
  require_one_layer(call);
  const mx::Stream stream = mx::to_stream(s);
  std::vector<mx::array> inputs = {mx::contiguous(x, false, stream), mx::contiguous(indices, false, stream)};
  inputs.insert(inputs.end(), bank.begin(), bank.end());
  if (scores) {
    inputs.push_back(mx::contiguous(*scores, false, stream));
  }
  return mx::array(
      swiglu_shape(indices, call), x.dtype(), std::make_shared<TrellisSwiglu>(stream, call), std::move(inputs));
}

void TrellisSwiglu::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  require_contiguous("trellis_swiglu", inputs);
  const mx::array& x = inputs[0];
  const mx::array& indices = inputs[1];
  const size_t up_first = 2 + static_cast<size_t>(call_.gate.num_arrays());
  const size_t down_first = up_first + static_cast<size_t>(call_.up.num_arrays());
  const cpu::SwigluArgs args{
      .dtype = cpu_dtype(x.dtype()),
      .x = x.data<void>(),
      .ids = indices.data<uint32_t>(),
      .scores = call_.combine ? inputs.back().data<float>() : nullptr,
      .out = out.data<void>(),
      .rows = static_cast<int64_t>(x.size() / call_.hidden),
      .top_k = indices.shape(-1),
      .hidden = call_.hidden,
      .activation = call_.activation,
      .alpha = call_.alpha,
      .limit = call_.limit,
      .gate = cpu_stack(call_.gate, inputs, 2),
      .up = cpu_stack(call_.up, inputs, up_first),
      .down = cpu_stack(call_.down, inputs, down_first)};
  const auto size = static_cast<int64_t>(out.size());
  mx::cpu::get_command_encoder(stream()).dispatch([args, size, config = cpu_config(call_.config)] {
    const int64_t slots = args.rows * args.top_k;
    require_ids_or_nan("trellis_swiglu", args.ids, slots, args.gate.experts, args.dtype, args.out, size);
    cpu::swiglu(args, config);
  });
}

void TrellisSwiglu::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  require_contiguous("trellis_swiglu", inputs);
  metal::encode_swiglu(call_, stream(), inputs, out);
}

std::vector<mx::Shape> TrellisSwiglu::output_shapes(const std::vector<mx::array>& inputs) {
  return {swiglu_shape(inputs[1], call_)};
}

// Recomputes gate and up by gathered products, then walks back through down, the activation, gate and up.
// Every product decodes tile by tile; nothing of the size of a weight matrix is made.
std::vector<mx::array> TrellisSwiglu::vjp(
    const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  const int scores_argnum = call_.combine ? static_cast<int>(primals.size()) - 1 : -1;
  for (const int argnum : argnums) {
    if (argnum != 0 && argnum != scores_argnum) {
      throw std::invalid_argument(
          "[trellis_swiglu] the gradient is defined with respect to x and scores only; freeze the trellis weights.");
    }
  }
  const mx::Stream s = stream();
  const mx::array& x = primals[0];
  const int top_k = primals[1].shape(-1);
  const int hidden = call_.hidden;
  const int inter = call_.gate.n;
  const Slots slots{call_, primals, mx::reshape(primals[1], {-1}, s), s};

  const mx::array x32 = mx::reshape(mx::astype(x, mx::float32, s), {-1, hidden}, s);
  const std::vector<mx::array> gate_up = {
      slots.product(x32, call_.gate, slots.gate_first(), hidden, inter, false),
      slots.product(x32, call_.up, slots.up_first(), hidden, inter, false)};
  const auto act = [this, s](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{activate(in[0], in[1], call_, s)};
  };

  // Cotangent of every slot's output, [rows * top_k, hidden].
  mx::array ct = mx::astype(cotangents[0], mx::float32, s);
  mx::array slot_ct = mx::reshape(ct, {-1, hidden}, s);
  if (call_.combine) {
    const mx::array scores = mx::reshape(primals.back(), {-1, top_k, 1}, s);
    slot_ct = mx::reshape(mx::multiply(mx::reshape(ct, {-1, 1, hidden}, s), scores, s), {-1, hidden}, s);
  }

  std::vector<mx::array> grads;
  for (const int argnum : argnums) {
    if (argnum == scores_argnum) {
      const mx::array h = act(gate_up)[0];
      const mx::array y = slots.product(h, call_.down, slots.down_first(), inter, hidden, false);
      const mx::array terms =
          mx::multiply(mx::reshape(y, {-1, top_k, hidden}, s), mx::reshape(ct, {-1, 1, hidden}, s), s);
      grads.push_back(mx::reshape(mx::sum(terms, 2, false, s), primals.back().shape(), s));
      continue;
    }
    const mx::array h_ct = slots.product(slot_ct, call_.down, slots.down_first(), inter, hidden, true);
    const auto act_ct = mx::vjp(act, gate_up, {h_ct}).second;
    const mx::array slot_grad = mx::add(
        slots.product(act_ct[0], call_.gate, slots.gate_first(), hidden, inter, true),
        slots.product(act_ct[1], call_.up, slots.up_first(), hidden, inter, true), s);
    const mx::array grad = mx::sum(mx::reshape(slot_grad, {-1, top_k, hidden}, s), 1, false, s);
    grads.push_back(mx::reshape(mx::astype(grad, x.dtype(), s), x.shape(), s));
  }
  return grads;
}

}  // namespace mlx_marlin
