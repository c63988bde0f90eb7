#include <nanobind/ndarray.h>

#include "bindings/bindings.h"
#include "viterbi/search.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlx_marlin {
namespace {

using Tiles = nb::ndarray<const float, nb::numpy, nb::shape<-1, 256>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::numpy, nb::shape<65536>, nb::c_contig, nb::device::cpu>;
using States = nb::ndarray<uint16_t, nb::numpy, nb::shape<-1, 256>, nb::c_contig>;

States search(const Tiles& tiles, const Values& values, int half_bits, int threads) {
  const size_t count = tiles.shape(0);
  auto* states = new uint16_t[count * 256];
  nb::capsule owner(states, [](void* p) noexcept { delete[] static_cast<uint16_t*>(p); });
  {
    nb::gil_scoped_release release;
    viterbi::search(tiles.data(), int64_t(count), values.data(), half_bits, states, threads);
  }
  return States(states, {count, 256}, owner);
}

}  // namespace

void bind_viterbi(nb::module_& m) {
  m.def(
      "viterbi_search", &search, "tiles"_a, "values"_a, "half_bits"_a, "threads"_a,
      "The tail-biting states nearest to float32 tiles [count, 256]. See mlx_marlin.ops.viterbi_search.");
}

}  // namespace mlx_marlin
