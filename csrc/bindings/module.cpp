#include "bindings/bindings.h"

#include <cstdint>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu/blas.h"
#include "cpu/instruction_set.h"
#include "cpu/pool.h"
#include "format.h"
#include "mlx/array.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlx_marlin {

namespace mx = mlx::core;

namespace {

void bind_runtime(nb::module_& m) {
  m.def(
      "abi_probe", [](const mx::array& a) { return static_cast<int>(a.size()); }, "a"_a,
      "Number of elements: fails where mx.array is not the type that this extension was built for.");
  m.def("is_tracer", &mx::array::is_tracer, "x"_a, "Whether the array is being traced.");
  m.def("cpu_digest", [] { return MARLIN_CPU_DIGEST; }, "Digest of what the CPU kernels were built from.");
  m.def("plan_digest", [] { return MARLIN_PLAN_DIGEST; }, "Digest of what plans and launches the Metal kernels.");
  m.def("set_num_threads", &cpu::set_threads, "n"_a, "Set the number of CPU workers.");
  m.def("num_threads", &cpu::threads, "The number of CPU workers.");
  m.def("instruction_sets", &cpu::instruction_sets, "Instruction sets that this machine can run, best last.");
  m.def(
      "compiled_instruction_sets", &cpu::compiled_instruction_sets,
      "Instruction sets that this build has, whether or not this machine can run them, best last.");
  m.def("instruction_set", [] { return cpu::name_of(cpu::instruction_set()); }, "The instruction set in use.");
  m.def("set_instruction_set", &cpu::set_instruction_set, "name"_a, "Use one instruction set, or \"auto\".");
  m.def(
      "replace_sgemm",
      [](uintptr_t sgemm, uintptr_t sgemv) {
        return cpu::replace_sgemm(reinterpret_cast<cpu::Sgemm>(sgemm), reinterpret_cast<cpu::Sgemv>(sgemv));
      },
      "sgemm"_a, "sgemv"_a, "Make MLX multiply by the functions at these addresses; whether it could be done.");
  m.attr("CODEBOOK_MULTIPLIERS") =
      nb::make_tuple(MARLIN_3INST_MULTIPLIER, MARLIN_MCG_MULTIPLIER, MARLIN_MUL1_MULTIPLIER);
}

}  // namespace

}  // namespace mlx_marlin

NB_MODULE(_ext, m) {
  // Registers mx.array and the stream types first, so that signatures name them.
  nb::module_::import_("mlx.core");
  m.doc() = "The C++ extension of mlx_marlin. Use it through mlx_marlin.ops.";
  mlx_marlin::bind_buffers(m);
  mlx_marlin::bind_primitives(m);
  mlx_marlin::bind_plan(m);
  mlx_marlin::bind_runtime(m);
  mlx_marlin::bind_viterbi(m);
}
