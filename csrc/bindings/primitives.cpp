#include "bindings/bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "primitives/attention.h"
#include "primitives/decode.h"
#include "primitives/embedding.h"
#include "primitives/expert_ids.h"
#include "primitives/linear.h"
#include "primitives/swiglu.h"
#include "primitives/viterbi.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlx_marlin {

namespace {

void bind_types(nb::module_& m) {
  nb::enum_<Variant>(m, "Variant", "Kernel family for a range of rows.")
      .value("decode", Variant::decode)
      .value("prefill4", Variant::prefill4)
      .value("base", Variant::base)
      .value("large_batch", Variant::large_batch);

  nb::class_<KernelConfig>(m, "KernelConfig", "kernels.KernelConfig as the primitives take it.")
      .def(
          "__init__",
          [](KernelConfig* self, Variant variant, int tile_m, int tile_n, int simdgroups, bool fp32) {
            new (self) KernelConfig{variant, tile_m, tile_n, simdgroups, fp32};
          },
          "variant"_a, "tile_size_m"_a, "tile_size_n"_a, "simdgroups"_a, "use_fp32_acc"_a)
      .def(
          "__eq__", [](const KernelConfig& a, const KernelConfig& b) { return a == b; }, nb::is_operator(),
          nb::sig("def __eq__(self, other: object, /) -> bool"));

  nb::class_<StackInfo>(m, "StackInfo", "Sizes and contents of a stack of trellis weights.")
      .def(
          "__init__",
          [](StackInfo* self, int experts, int k, int n, bool bias, uint32_t widths, uint32_t codebooks) {
            new (self) StackInfo{experts, k, n, bias, widths, codebooks};
          },
          "experts"_a, "k"_a, "n"_a, "bias"_a, "widths"_a, "codebooks"_a);
}

void bind_linear(nb::module_& m) {
  m.def(
      "trellis_linear",
      [](const mx::array& x, const std::vector<mx::array>& stack, const StackInfo& info, int in_features,
         int out_features, const KernelConfig& config, mx::StreamOrDevice s) {
        const LinearCall call{
            .in_features = in_features,
            .out_features = out_features,
            .x_divisor = 1,
            .gathered = false,
            .transposed = false,
            .stack = info,
            .config = config};
        return trellis_linear(x, std::nullopt, stack, call, s);
      },
      "x"_a, "stack"_a, "info"_a, "in_features"_a, "out_features"_a, "config"_a, "stream"_a = nb::none(),
      "x @ W + bias for one trellis weight. See mlx_marlin.trellis_linear, which checks the arguments.");

  m.def(
      "trellis_gather_linear",
      [](const mx::array& x, const mx::array& ids, const std::vector<mx::array>& stack, const StackInfo& info,
         int in_features, int out_features, const KernelConfig& config, mx::StreamOrDevice s) {
        const LinearCall call{
            .in_features = in_features,
            .out_features = out_features,
            .x_divisor = 1,
            .gathered = true,
            .transposed = false,
            .stack = info,
            .config = config};
        return trellis_linear(x, ids, stack, call, s);
      },
      "x"_a, "ids"_a, "stack"_a, "info"_a, "in_features"_a, "out_features"_a, "config"_a, "stream"_a = nb::none(),
      "The experts of one stack: uint32 ids [...] -> [..., out]; each row of x serves as many ids as there are per "
      "row.");
}

}  // namespace

void bind_primitives(nb::module_& m) {
  bind_types(m);
  m.def(
      "expert_ids", &expert_ids, "op"_a, "indices"_a, "experts"_a, "stream"_a = nb::none(),
      "Integer indices as uint32, outside of gradients. Raises ValueError where one is out of range and known by now.");

  bind_linear(m);

  m.def(
      "trellis_swiglu",
      [](const mx::array& x, const mx::array& indices, const std::optional<mx::array>& scores,
         const std::vector<mx::array>& bank, const std::optional<StackInfo>& gate, const StackInfo& up,
         const StackInfo& down, int hidden, int activation, float alpha, float limit, const KernelConfig& config,
         bool absent, mx::StreamOrDevice s) {
        const SwigluCall call{
            .hidden = hidden,
            .activation = activation,
            .alpha = alpha,
            .limit = limit,
            .combine = scores.has_value(),
            .gated = gate.has_value(),
            .gate = gate.value_or(StackInfo{}),
            .up = up,
            .down = down,
            .config = config,
            .absent = absent};
        return trellis_swiglu(x, indices, scores, bank, call, s);
      },
      "x"_a, "indices"_a, "scores"_a.none(), "bank"_a, "gate"_a.none(), "up"_a, "down"_a, "hidden"_a, "activation"_a,
      "alpha"_a, "limit"_a, "config"_a, "absent"_a, "stream"_a = nb::none(),
      "The fused experts of a layer. See mlx_marlin.trellis_swiglu and trellis_mlp, which check the arguments.");

  m.def(
      "trellis_decode",
      [](const std::vector<mx::array>& stack, const StackInfo& info, int expert, mx::StreamOrDevice s) {
        return trellis_decode(stack, {expert, info}, s);
      },
      "stack"_a, "info"_a, "expert"_a, "stream"_a = nb::none(), "The inner matrix of one expert, float16 [k, n].");

  m.def(
      "trellis_embedding",
      [](const mx::array& ids, const mx::array& codes, const mx::array& signs, int features, int bits, mx::Dtype dtype,
         mx::StreamOrDevice s) {
        return trellis_embedding(ids, codes, signs, {codes.shape(0), features, bits}, dtype, s);
      },
      "ids"_a, "codes"_a, "signs"_a, "features"_a, "bits"_a, "dtype"_a, "stream"_a = nb::none(),
      "Rows of a quantized token embedding: uint32 ids [...] -> [..., features].");

  m.def(
      "trellis_viterbi",
      [](const mx::array& tiles, const mx::array& values, int half_bits, int codebook, mx::StreamOrDevice s) {
        return trellis_viterbi(tiles, values, {half_bits, codebook}, s);
      },
      "tiles"_a, "values"_a, "half_bits"_a, "codebook"_a, "stream"_a = nb::none(),
      "The states nearest to float32 tiles [count, 256], given the codebook's float16 values [65536]. See "
      "mlx_marlin.ops.viterbi_search, which checks the arguments.");

  m.def(
      "cpu_attention", &cpu_attention, "queries"_a, "keys"_a, "values"_a, "mask"_a.none(), "sinks"_a.none(), "scale"_a,
      "causal"_a, "stream"_a = nb::none(),
      "Softmax attention on the CPU. See mlx_marlin.ops.attention, which checks the arguments.");
}

}  // namespace mlx_marlin
