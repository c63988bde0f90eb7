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

// The products of x -> down's input, in MLX ops: what the vjp differentiates. The same formulas as cpu/tier/activation.h.
mx::array activate(const std::vector<mx::array>& products, const SwigluCall& call, mx::Stream s) {
  const auto f32 = [](float value) { return mx::array(value, mx::float32); };
  const mx::array& x = products[0];
  const auto gating = [&](const mx::array& activated) {
    return call.gated ? mx::multiply(activated, products[1], s) : activated;
  };
  const auto swish = [&](const mx::array& a) { return mx::multiply(a, mx::sigmoid(a, s), s); };
  const auto clamped = [&](const mx::array& up) { return mx::clip(up, f32(-call.limit), f32(call.limit), s); };
  const auto saturated = [&](const mx::array& a, float bound) {
    return mx::multiply(f32(bound), mx::tanh(mx::divide(a, f32(bound), s), s), s);
  };
  switch (call.activation) {
    case MARLIN_ACTIVATION_SILU:
      return gating(swish(x));
    case MARLIN_ACTIVATION_GELU_TANH: {
      // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), Hendrycks and Gimpel, 2016.
      const mx::array cube = mx::multiply(mx::multiply(x, x, s), x, s);
      const mx::array inner = mx::multiply(f32(0.7978845608f), mx::add(x, mx::multiply(f32(0.044715f), cube, s), s), s);
      return gating(mx::multiply(mx::multiply(f32(0.5f), x, s), mx::add(f32(1.0f), mx::tanh(inner, s), s), s));
    }
    case MARLIN_ACTIVATION_RELU_SQUARED:
      return gating(mx::square(mx::maximum(x, f32(0.0f), s), s));
    case MARLIN_ACTIVATION_SITU:
      return mx::multiply(
          mx::multiply(saturated(x, call.alpha), mx::sigmoid(x, s), s), saturated(products[1], call.limit), s);
    case MARLIN_ACTIVATION_SWIGLU_STEP:
      return mx::multiply(mx::minimum(swish(x), f32(call.limit), s), clamped(products[1]), s);
    case MARLIN_ACTIVATION_SWIGLU_CLAMPED:
      return mx::multiply(swish(mx::minimum(x, f32(call.limit), s)), clamped(products[1]), s);
    default: {
      const mx::array g = mx::minimum(x, f32(call.limit), s);
      const mx::array gate = mx::multiply(g, mx::sigmoid(mx::multiply(f32(call.alpha), g, s), s), s);
      return mx::multiply(gate, mx::add(clamped(products[1]), f32(1.0f), s), s);
    }
  }
}

// Where the arrays of the stacks begin among the inputs.
constexpr size_t kStacks = 2;

size_t up_first(const SwigluCall& call) {
  return kStacks + (call.gated ? static_cast<size_t>(call.gate.num_arrays()) : 0);
}

size_t down_first(const SwigluCall& call) {
  return up_first(call) + static_cast<size_t>(call.up.num_arrays());
}

// The gathered products that a fused call stands for, used by its vjp: float32 between them.
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

  // By each projection of x; `transposed`: rows of the products, back to rows of x.
  std::vector<mx::array> side_by_side(const std::vector<mx::array>& rows, bool transposed) const {
    std::vector<mx::array> found;
    if (call.gated) {
      found.push_back(product(rows.front(), call.gate, kStacks, call.hidden, call.gate.n, transposed));
    }
    found.push_back(product(rows.back(), call.up, up_first(call), call.hidden, call.up.n, transposed));
    return found;
  }
  mx::array down(const mx::array& rows, bool transposed) const {
    return product(rows, call.down, down_first(call), call.up.n, call.hidden, transposed);
  }
};

std::string describe(const StackInfo& info) {
  return std::to_string(info.experts) + " of [" + std::to_string(info.k) + ", " + std::to_string(info.n) + "]";
}

// One index serves all projections, and the width of gate and up flows into down.
void require_one_layer(const SwigluCall& call) {
  const StackInfo &gate = call.gated ? call.gate : call.up, &up = call.up, &down = call.down;
  const bool experts = gate.experts == up.experts && up.experts == down.experts;
  if (!experts || gate.k != up.k || gate.n != up.n || down.k != up.n || down.n != up.k) {
    std::string found;
    call.each_stack([&](const char* name, const StackInfo& info) {
      found += std::string(found.empty() ? "" : ", ") + name + " " + describe(info);
    });
    throw std::invalid_argument(
        std::string("[") + call.name() +
        "] all projections must have the same experts, gate the sizes of up, and down its sizes exchanged; got " +
        found + ".");
  }
}

}  // namespace

mx::array trellis_swiglu(
    const mx::array& x, const mx::array& indices, const std::optional<mx::array>& scores,
    const std::vector<mx::array>& bank, const SwigluCall& call, mx::StreamOrDevice s) {
  require_one_layer(call);
  if (call.absent && call.combine) {
    throw std::invalid_argument(std::string("[") + call.name() + "] experts that are not here cannot be combined.");
  }
  const mx::Stream stream = mx::to_stream(s);
  std::vector<mx::array> inputs = {mx::contiguous(x, false, stream), mx::contiguous(indices, false, stream)};
  inputs.insert(inputs.end(), bank.begin(), bank.end());
  if (scores) {
    inputs.push_back(mx::contiguous(*scores, false, stream));
  }
  const mx::array y(
      swiglu_shape(indices, call), x.dtype(), std::make_shared<TrellisSwiglu>(stream, call), std::move(inputs));
  if (!call.absent) {
    return y;
  }
  // The kernels compute nothing of such a slot, and on a GPU leave NaN. No cotangent reaches it either.
  const mx::array here = mx::less(indices, mx::array(call.up.experts, mx::uint32), stream);
  return mx::where(mx::expand_dims(here, -1, stream), y, mx::array(0.0f, x.dtype()), stream);
}

void TrellisSwiglu::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  require_contiguous(call_.name(), inputs);
  const mx::array& x = inputs[0];
  const mx::array& indices = inputs[1];
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
      .gate = call_.gated ? cpu_stack(call_.gate, inputs, kStacks) : cpu::Stack{},
      .up = cpu_stack(call_.up, inputs, up_first(call_)),
      .down = cpu_stack(call_.down, inputs, down_first(call_))};
  const auto size = static_cast<int64_t>(out.size());
  const int ids = call_.up.experts + (call_.absent ? 1 : 0);  // that are legal
  mx::cpu::get_command_encoder(stream()).dispatch(
      [args, size, ids, name = call_.name(), config = cpu_config(call_.config)] {
        const int64_t slots = args.rows * args.top_k;
        require_ids_or_nan(name, args.ids, slots, ids, args.dtype, args.out, size);
        cpu::swiglu(args, config);
      });
}

void TrellisSwiglu::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  require_contiguous(call_.name(), inputs);
  metal::encode_swiglu(call_, stream(), inputs, out);
}

std::vector<mx::Shape> TrellisSwiglu::output_shapes(const std::vector<mx::array>& inputs) {
  return {swiglu_shape(inputs[1], call_)};
}

// Recomputes the products of x by gathered products, then walks back through down, the activation and those products.
// Every product decodes tile by tile; nothing of the size of a weight matrix is made.
std::vector<mx::array> TrellisSwiglu::vjp(
    const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  const int scores_argnum = call_.combine ? static_cast<int>(primals.size()) - 1 : -1;
  for (const int argnum : argnums) {
    if (argnum != 0 && argnum != scores_argnum) {
      throw std::invalid_argument(
          std::string("[") + call_.name() +
          "] the gradient is defined with respect to x and scores only; freeze the trellis weights.");
    }
  }
  const mx::Stream s = stream();
  const mx::array& x = primals[0];
  const int top_k = primals[1].shape(-1);
  const int hidden = call_.hidden;
  mx::array ids = mx::reshape(primals[1], {-1}, s);
  if (call_.absent) {  // by any expert that is here: the cotangents of such slots are zeros
    ids = mx::minimum(ids, mx::array(call_.up.experts - 1, mx::uint32), s);
  }
  const Slots slots{call_, primals, ids, s};

  const mx::array x32 = mx::reshape(mx::astype(x, mx::float32, s), {-1, hidden}, s);
  const std::vector<mx::array> products = slots.side_by_side({x32}, false);
  const auto act = [this, s](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{activate(in, call_, s)};
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
      const mx::array y = slots.down(act(products)[0], false);
      const mx::array terms =
          mx::multiply(mx::reshape(y, {-1, top_k, hidden}, s), mx::reshape(ct, {-1, 1, hidden}, s), s);
      grads.push_back(mx::reshape(mx::sum(terms, 2, false, s), primals.back().shape(), s));
      continue;
    }
    const auto act_ct = mx::vjp(act, products, {slots.down(slot_ct, true)}).second;
    const std::vector<mx::array> parts = slots.side_by_side(act_ct, true);
    const mx::array slot_grad = call_.gated ? mx::add(parts[0], parts[1], s) : parts[0];
    const mx::array grad = mx::sum(mx::reshape(slot_grad, {-1, top_k, hidden}, s), 1, false, s);
    grads.push_back(mx::reshape(mx::astype(grad, x.dtype(), s), x.shape(), s));
  }
  return grads;
}

}  // namespace mlx_marlin
