// One function per stage: the dispatch that runs it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "plan/plan.h"
#include "plan/tiling.h"

namespace mlx_marlin {

// A projection's name in the bindings and what is stacked there.
struct Weights {
  std::string name;  // "gate", "up", "down"; "weight" for a linear
  StackInfo info;
  bool transposed = false;  // W^T: k and n of the info have changed places, and so have suh and svh
};

// The projections of a layer's experts that read x: gate and up, or up alone, which is `first` then.
struct SideBySide {
  explicit SideBySide(const SwigluCall& call)
      : gated(call.gated), up{"up", call.up}, first(gated ? Weights{"gate", call.gate} : up) {}

  bool gated;
  Weights up;
  Weights first;
};

// The rows of x and y that one pass over the stages covers, and how their slots find their experts.
struct Pass {
  int dtype;
  uint64_t first_row;  // of x and y
  uint32_t rows;       // of x
  uint32_t slots_per_row;
  uint32_t experts;
  bool indexed;      // experts come from indices; otherwise expert 0
  bool routed;       // positions are slots sorted by expert; otherwise they are slots
  bool fragments;    // rotated activations are fragments of 8 positions
  bool accelerator;  // products run on the neural accelerators
  bool halves;       // operands are halves, or on the accelerators one half instead of two
  uint32_t tile_rows;

  uint32_t slots() const {
    return rows * slots_per_row;
  }
  uint64_t first_slot() const {
    return first_row * slots_per_row;
  }
  uint32_t buckets() const {
    return experts + 1;  // the last one: out of range
  }
  uint32_t alignment() const {
    return fragments ? 8 : 1;
  }
  uint32_t positions() const {
    // Every expert that has slots may leave a unit incomplete.
    return routed ? slots() + std::min(slots(), buckets()) * (alignment() - 1) : slots();
  }
  // Rows that a buffer by position has.
  uint64_t position_rows() const {
    return fragments ? (uint64_t(positions()) + 7) / 8 * 8 : positions();
  }
  // Bytes of a buffer of rotated activations.
  uint64_t rotated_bytes(int k) const {
    return operand_bytes(position_rows(), k, halves, accelerator);
  }
  uint32_t row_tiles() const;
  uint64_t element_size() const;
};

// Where a product's rotated rows come from.
enum class Input {
  rotated,    // scratch "rotated"
  activated,  // scratch "activated"
  x,          // x, rotated by the product itself
  sums,       // scratch "sums" of gate and up, activated by the product itself
};

// What a linear product reads and writes.
struct LinearStage {
  Weights weights;
  Tiling tiling;
  uint32_t in_columns;   // of x
  uint32_t out_columns;  // of y
  Input input;
  bool raw;                          // writes sums before H, to "slots"
  bool to_y;                         // writes rows of y; otherwise to "slots"
  const SwigluCall* call = nullptr;  // for Input::sums
};

struct CombineStage {
  Weights weights;
  uint32_t out_columns;
  uint32_t slots_per_row;  // of y
  bool raw;
  bool weighted;
};

void add_route(Plan& plan, const Pass& pass);
// second: null for a single weight.
void add_rotate(Plan& plan, const Pass& pass, const Weights& first, const Weights* second, uint32_t columns);
void add_gate_up(Plan& plan, const Pass& pass, const SwigluCall& call, const Tiling& tiling, bool rotated);
void add_activate(Plan& plan, const Pass& pass, const SwigluCall& call);
void add_linear(Plan& plan, const Pass& pass, const LinearStage& stage);
void add_combine(Plan& plan, const Pass& pass, const CombineStage& stage);

}  // namespace mlx_marlin
