#include "primitives/viterbi.h"

#include "cpu/pool.h"
#include "metal/encode.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "primitives/require_contiguous.h"
#include "viterbi/search.h"

namespace mlx_marlin {

mx::array trellis_viterbi(
    const mx::array& tiles, const mx::array& values, const ViterbiCall& call, mx::StreamOrDevice s) {
  return mx::array(
      tiles.shape(), mx::uint16, std::make_shared<TrellisViterbi>(mx::to_stream(s), call), {tiles, values});
}

void TrellisViterbi::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  require_contiguous(name(), inputs);
  const auto* halves = inputs[1].data<mx::float16_t>();
  mx::cpu::get_command_encoder(stream()).dispatch([tiles = inputs[0].data<float>(),
                                                   count = static_cast<int64_t>(inputs[0].shape(0)),
                                                   values = std::vector<float>(halves, halves + inputs[1].size()),
                                                   half_bits = call_.half_bits, states = out.data<uint16_t>()] {
    viterbi::search(tiles, count, values.data(), half_bits, states, cpu::threads());
  });
}

void TrellisViterbi::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  require_contiguous(name(), inputs);
  metal::encode_viterbi(call_, stream(), inputs, out);
}

std::vector<mx::Shape> TrellisViterbi::output_shapes(const std::vector<mx::array>& inputs) {
  return {inputs[0].shape()};
}

std::vector<mx::array> TrellisViterbi::vjp(
    const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
    const std::vector<mx::array>&) {
  throw std::invalid_argument("[trellis_viterbi] the search has no gradient.");
}

}  // namespace mlx_marlin
