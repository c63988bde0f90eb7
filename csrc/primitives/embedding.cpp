#include "primitives/embedding.h"

#include "cpu/pool.h"
#include "metal/encode.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "primitives/cpu_arguments.h"
#include "primitives/expert_ids.h"
#include "primitives/require_contiguous.h"

namespace mlx_marlin {

namespace {

mx::Shape embedding_shape(const mx::array& ids, const EmbeddingCall& call) {
  mx::Shape shape = ids.shape();
  shape.push_back(call.features);
  return shape;
}

}  // namespace

mx::array trellis_embedding(
    const mx::array& ids, const mx::array& codes, const mx::array& signs, const EmbeddingCall& call, mx::Dtype dtype,
    mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  return mx::array(
      embedding_shape(ids, call), dtype, std::make_shared<TrellisEmbedding>(stream, call),
      {mx::contiguous(ids, false, stream), codes, signs});
}

void TrellisEmbedding::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  require_contiguous(name(), inputs);
  const cpu::EmbeddingArgs args{
      .dtype = cpu_dtype(out.dtype()),
      .ids = inputs[0].data<uint32_t>(),
      .rows = static_cast<int64_t>(inputs[0].size()),
      .codes = inputs[1].data<uint16_t>(),
      .signs = reinterpret_cast<const uint16_t*>(inputs[2].data<mx::float16_t>()),
      .out = out.data<void>(),
      .features = call_.features,
      .bits = call_.bits};
  mx::cpu::get_command_encoder(stream()).dispatch([args, vocabulary = call_.rows, size = out.size()] {
    require_ids_or_nan(
        "trellis_embedding", args.ids, args.rows, vocabulary, args.dtype, args.out, static_cast<int64_t>(size));
    cpu::embedding(args, cpu::threads());
  });
}

void TrellisEmbedding::eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) {
  require_contiguous(name(), inputs);
  metal::encode_embedding(call_, stream(), inputs, out);
}

std::vector<mx::Shape> TrellisEmbedding::output_shapes(const std::vector<mx::array>& inputs) {
  return {embedding_shape(inputs[0], call_)};
}

std::vector<mx::array> TrellisEmbedding::vjp(
    const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
    const std::vector<mx::array>&) {
  throw std::invalid_argument("[trellis_embedding] the trellis has no gradient; freeze the embedding.");
}

}  // namespace mlx_marlin
