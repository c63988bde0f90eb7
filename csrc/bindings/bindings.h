// One function per source file that adds to the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace mlx_marlin {

void bind_buffers(nanobind::module_& m);
void bind_primitives(nanobind::module_& m);
void bind_plan(nanobind::module_& m);
void bind_viterbi(nanobind::module_& m);

}  // namespace mlx_marlin
