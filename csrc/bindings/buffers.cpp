#include "bindings/bindings.h"

#include <cstdint>
#include <utility>

#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"
#include "mlx/allocator.h"
#include "mlx/array.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlx_marlin {

namespace mx = mlx::core;

namespace {

// Ask for huge pages: the kernel clears and maps a gigabyte of 4 KB pages in as much time as reading it takes.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;  // x86-64, and arm64 with 4 KB pages
  auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
  }
#endif
}

mx::array uninitialized(const std::vector<int>& shape, mx::Dtype dtype) {
  size_t bytes = size_of(dtype);
  for (int size : shape) {
    bytes *= static_cast<size_t>(size);
  }
  mx::allocator::Data data = mx::allocator::malloc(bytes);
  advise_huge_pages(data.buffer().raw_ptr(), bytes);
  return mx::array(std::move(data), mx::Shape(shape.begin(), shape.end()), dtype);
}

using Halves = nb::ndarray<const uint16_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void widen(const Halves& halves, bool is_bfloat, const Floats& into) {
  if (halves.size() != into.size()) {
    throw nb::value_error("as many floats as halves are wanted");
  }
  nb::gil_scoped_release release;
  const auto dtype = is_bfloat ? cpu::DType::bfloat16 : cpu::DType::float16;
  cpu::widen(dtype, halves.data(), static_cast<int64_t>(halves.size()), into.data());
}

}  // namespace

void bind_buffers(nb::module_& m) {
  m.def(
      "uninitialized", &uninitialized, "shape"_a, "dtype"_a,
      "An array whose memory is to be written before anything is computed from it.");
  m.def(
      "widen", &widen, "halves"_a.noconvert(), "is_bfloat"_a, "into"_a.noconvert(),
      "Halves, or bfloat16 words, as float32. See mlx_marlin.ops.widen.");
}

}  // namespace mlx_marlin
