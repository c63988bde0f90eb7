#include "primitives/decode.h"

#include "cpu/pool.h"
#include "metal/encode.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "primitives/cpu_arguments.h"
#include "primitives/require_contiguous.h"

namespace mlx_marlin {

mx::array trellis_decode(const std::vector<mx::array>& stack, const DecodeCall& call, mx::StreamOrDevice s) {
  return mx::array(
      {call.stack.k, call.stack.n}, mx::float16, std::make_shared<TrellisDecode>(mx::to_stream(s), call), stack);
}

void TrellisDecode::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  require_contiguous("trellis_decode", inputs);
  mx::cpu::get_command_encoder(stream()).dispatch([stack = cpu_stack(call_.stack, inputs, 0), expert = call_.expert,
                                                   to = reinterpret_cast<uint16_t*>(out.data<mx::float16_t>())] {
    cpu::decode(stack, expert, to, cpu::threads());
  });
}

void TrellisDecode::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  require_contiguous("trellis_decode", inputs);
  metal::encode_decode(call_, stream(), inputs, out);
}

std::vector<mx::Shape> TrellisDecode::output_shapes(const std::vector<mx::array>&) {
  return {{call_.stack.k, call_.stack.n}};
}

std::vector<mx::array> TrellisDecode::vjp(
    const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
    const std::vector<mx::array>&) {
  throw std::invalid_argument("[trellis_decode] the trellis has no gradient; freeze the trellis weights.");
}

}  // namespace mlx_marlin
