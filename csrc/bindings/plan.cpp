#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "metal/shaders.h"
#include "plan/build_errors.h"
#include "plan/plan.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlx_marlin {

namespace {

nb::tuple triple(const std::array<uint32_t, 3>& v) {
  return nb::make_tuple(v[0], v[1], v[2]);
}

nb::dict to_python(const Dispatch& d) {
  nb::dict constants;
  for (const Constant& c : d.constants) {
    constants[c.name.c_str()] = c.value;
  }
  nb::list buffers;
  for (const Binding& b : d.buffers) {
    nb::dict entry;
    entry["slot"] = b.slot;
    entry["name"] = b.name;
    entry["offset"] = b.offset;
    entry["bytes"] = b.bytes;
    entry["access"] = b.access == Access::read ? "r" : "w";
    entry["alignment"] = b.alignment;
    buffers.append(entry);
  }
  nb::dict out;
  out["kernel"] = d.kernel;
  out["constants"] = constants;
  out["grid"] = triple(d.grid);
  out["threads"] = triple(d.threads);
  out["args"] = nb::bytes(d.args.data(), d.args.size());
  out["buffers"] = buffers;
  out["threadgroup_bytes"] = d.threadgroup_bytes;
  out["after"] = d.after;
  return out;
}

nb::dict to_python(const Plan& plan) {
  nb::list dispatches;
  for (const Dispatch& d : plan.dispatches) {
    dispatches.append(to_python(d));
  }
  nb::dict scratch;
  for (const auto& [name, bytes] : plan.scratch) {
    scratch[name.c_str()] = bytes;
  }
  nb::dict out;
  out["dispatches"] = dispatches;
  out["scratch"] = scratch;
  return out;
}

}  // namespace

void bind_plan(nb::module_& m) {
  m.def(
      "plan_linear",
      [](int64_t rows, int dtype, const StackInfo& stack, int in_features, int out_features, int x_divisor,
         bool gathered, bool transposed, const KernelConfig& config) {
        return to_python(
            plan_linear({in_features, out_features, x_divisor, gathered, transposed, stack, config}, rows, dtype));
      },
      "rows"_a, "dtype"_a, "stack"_a, "in_features"_a, "out_features"_a, "x_divisor"_a, "gathered"_a, "transposed"_a,
      "config"_a, "The Metal dispatches of a trellis_linear. See mlx_marlin.plan.");

  m.def(
      "plan_swiglu",
      [](int64_t rows, int top_k, int dtype, const std::optional<StackInfo>& gate, const StackInfo& up,
         const StackInfo& down, int hidden, int activation, float alpha, float limit, bool combine,
         const KernelConfig& config) {
        const SwigluCall call{hidden, activation, alpha, limit, combine, gate.has_value(), gate.value_or(StackInfo{}),
                              up,     down,       config};
        return to_python(plan_swiglu(call, rows, top_k, dtype));
      },
      "rows"_a, "top_k"_a, "dtype"_a, "gate"_a.none(), "up"_a, "down"_a, "hidden"_a, "activation"_a, "alpha"_a,
      "limit"_a, "combine"_a, "config"_a, "The Metal dispatches of a trellis_swiglu. See mlx_marlin.plan.");

  m.def(
      "plan_decode", [](const StackInfo& stack, int expert) { return to_python(plan_decode({expert, stack})); },
      "stack"_a, "expert"_a, "The Metal dispatch of a trellis_decode.");

  m.def(
      "plan_embedding",
      [](int64_t rows, int dtype, int vocabulary, int features, int bits) {
        return to_python(plan_embedding({vocabulary, features, bits}, rows, dtype));
      },
      "rows"_a, "dtype"_a, "vocabulary"_a, "features"_a, "bits"_a, "The Metal dispatches of a trellis_embedding.");

  m.def(
      "plan_viterbi",
      [](int64_t tiles, int half_bits, int codebook, uint64_t history_bytes) {
        return to_python(plan_viterbi({half_bits, codebook}, tiles, history_bytes));
      },
      "tiles"_a, "half_bits"_a, "codebook"_a, "history_bytes"_a = kHistoryBytes,
      "The Metal dispatches of a trellis_viterbi.");

  m.def(
      "kernel_library",
      [](const std::string& kernel, const std::unordered_map<std::string, uint32_t>& constants,
         const std::string& file) {
        Dispatch d;
        d.kernel = kernel;
        for (const auto& [name, value] : constants) {
          d.constants.push_back({name, value});
        }
        return nb::make_tuple(d.host_name(), d.library(file));
      },
      "kernel"_a, "constants"_a, "file"_a, "What is compiled for a dispatch: the kernel's name in it, and its text.");

  m.def(
      "build_errors", &build_errors, "text"_a,
      "The lines with `error:` of a compiler's output and two after each; all of it where there are none.");

  m.attr("SOURCE_CONSTANTS") = nb::cast(kSourceConstants);

  m.def("set_shaders", &metal::set_shaders, "sources"_a, "Self-contained Metal source by kernel family.");
}

}  // namespace mlx_marlin
