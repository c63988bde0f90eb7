// The Metal standard library for "C++ for OpenCL" (clang -x clcpp) on a CPU. Address spaces map to
// the real OpenCL ones. Only ever included by the units that compiler.py writes.
#pragma once

#include "base.h"
#include "vectors.h"
#include "traits.h"
#include "math.h"
#include "integer.h"
#include "relational.h"
#include "simdgroup.h"
#include "matrix.h"
#include "tensor_ops.h"
#include "atomics.h"
#include "apple_builtins.h"
#include "entry.h"
