// Collects a dispatch: constants by name, argument bytes, buffers by slot.
#pragma once

#include <bit>
#include <string>
#include <type_traits>
#include <utility>

#include "args.h"
#include "format.h"
#include "plan/plan.h"
#include "plan/stages.h"

namespace mlx_marlin {

inline uint32_t ceil_div(uint64_t a, uint64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

class Builder {
 public:
  Builder(std::string kernel, uint32_t simdgroups) {
    dispatch_.kernel = "trellis_" + std::move(kernel);
    dispatch_.threads = {simdgroups * MARLIN_SIMD_SIZE, 1, 1};
    dispatch_.threadgroup_bytes = 0;
    constant("max_threads", simdgroups * MARLIN_SIMD_SIZE);
  }

  Builder& grid(uint32_t x, uint32_t y = 1, uint32_t z = 1) {
    dispatch_.grid = {x, y, z};
    return *this;
  }

  Builder& threadgroup_bytes(uint32_t bytes) {
    dispatch_.threadgroup_bytes = (bytes + 15) / 16 * 16;  // Metal wants multiples of 16
    return *this;
  }

  template <class Args>
  Builder& args(const Args& args) {
    static_assert(std::is_trivially_copyable_v<Args>);
    dispatch_.args.assign(reinterpret_cast<const char*>(&args), sizeof(args));
    return *this;
  }

  Builder& constant(const char* name, uint32_t value) {
    dispatch_.constants.push_back({name, value});
    return *this;
  }

  // alignment: that of an element, which every array has, unless the kernel loads several at a time. Scratch begins
  // where an allocation does.
  Builder& read(int slot, const std::string& name, uint64_t bytes, uint64_t offset = 0, uint32_t alignment = 1) {
    dispatch_.buffers.push_back({slot, name, offset, bytes, Access::read, alignment});
    return *this;
  }

  Builder& write(int slot, const std::string& name, uint64_t bytes, uint64_t offset = 0) {
    dispatch_.buffers.push_back({slot, name, offset, bytes, Access::write, 1});
    return *this;
  }

  Builder& codes(int first_slot, const Weights& w) {
    const uint64_t widest = std::bit_width(w.info.widths) - 1;  // in half bits
    const uint64_t experts = static_cast<uint64_t>(w.info.experts);
    // A lane loads its 8 bytes of an 8-bit tile at once. Every expert begins at a multiple of 256 half bits.
    const uint32_t alignment = widest == 2 * MARLIN_MAX_BITS ? 8 : 4;
    return read(first_slot, w.name + ".codes", experts * w.info.k * w.info.n * widest / 16, 0, alignment)
        .read(first_slot + 1, w.name + ".offsets", experts * 8)
        .read(first_slot + 2, w.name + ".formats", experts * 4);
  }

  Builder& suh(int slot, const Weights& w) {
    const uint64_t bytes = static_cast<uint64_t>(w.info.experts) * w.info.k * 2;
    return read(slot, w.name + (w.transposed ? ".svh" : ".suh"), bytes, 0, kHalf2);
  }

  Builder& svh(int slot, const Weights& w) {
    const uint64_t bytes = static_cast<uint64_t>(w.info.experts) * w.info.n * 2;
    return read(slot, w.name + (w.transposed ? ".suh" : ".svh"), bytes, 0, kHalf2);
  }

  Builder& bias(int slot, const Weights& w) {
    return read(slot, w.name + ".bias", static_cast<uint64_t>(w.info.experts) * w.info.n * 4, 0, kFloat2);
  }

  Builder& x(int slot, const Pass& pass, uint32_t columns) {
    const uint64_t row = columns * pass.element_size();
    return read(slot, "x", pass.rows * row, pass.first_row * row);
  }

  Builder& indices(int slot, const Pass& pass) {
    return read(slot, "indices", pass.slots() * 4ull, pass.first_slot() * 4);
  }

  Builder& order(int slot, const Pass& pass) {
    return read(slot, "order", pass.positions() * 4ull);
  }

  Dispatch done() {
    return std::move(dispatch_);
  }

 private:
  static constexpr uint32_t kHalf2 = 4;
  static constexpr uint32_t kFloat2 = 8;
  Dispatch dispatch_;
};

}  // namespace mlx_marlin
