// A call made concrete for the GPU: kernels, constants, grids, argument bytes, buffers and scratch. A pure
// function of the call's shapes; no MLX and no GPU headers, so that it runs and is tested anywhere.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "call.h"

namespace mlx_marlin {

struct Constant {
  std::string name;  // of MARLIN_SOURCE_CONSTANTS or MARLIN_FUNCTION_CONSTANTS
  uint32_t value;

  bool operator==(const Constant&) const = default;
};

// Names of MARLIN_SOURCE_CONSTANTS.
extern const std::vector<std::string> kSourceConstants;

enum class Access { read, write };

struct Binding {
  int slot;
  std::string name;  // "x", "indices", "scores", "y", "gate.codes", ..., or a scratch name
  uint64_t offset;   // bytes
  uint64_t bytes;    // from the offset on; codes of mixed widths: an upper bound
  Access access;
  uint32_t alignment;  // of its address: the bytes of the widest load
};

// args are bound to slot 0.
struct Dispatch {
  std::string kernel;  // a function of <stem>.metal, called trellis_<stem>, with its template arguments
  std::vector<Constant> constants;
  std::array<uint32_t, 3> grid;  // threadgroups
  std::array<uint32_t, 3> threads;
  std::string args;
  std::vector<Binding> buffers;
  uint32_t threadgroup_bytes;
  std::vector<int> after;  // dispatches that must have finished

  // <stem> of the kernel's file.
  std::string stem() const;
  // The value of a constant, 0 if the dispatch does not name it.
  uint32_t constant(std::string_view name) const;
  // The kernel's name in its library: Metal wants an identifier.
  std::string host_name() const;
  // The library: a definition for each of kSourceConstants, the kernel's file, and if it is a template its instance.
  std::string library(const std::string& file) const;
};

struct Plan {
  std::vector<Dispatch> dispatches;
  std::vector<std::pair<std::string, uint64_t>> scratch;  // name, bytes

  void add(Dispatch dispatch);  // fills in `after`
  void reserve(const std::string& name, uint64_t bytes);
};

// dtype: MARLIN_DTYPE_* of x and y. Throw std::invalid_argument for a config that kernels.feasible refuses and for
// calls that have no kernel.
Plan plan_linear(const LinearCall& call, int64_t rows, int dtype);
Plan plan_swiglu(const SwigluCall& call, int64_t rows, int top_k, int dtype);
Plan plan_decode(const DecodeCall& call);
Plan plan_embedding(const EmbeddingCall& call, int64_t rows, int dtype);

// Minima that the encoder's search keeps of all tiles at a time, as scratch. At 2.8 MB for each at 3 bits, 5.6 at most,
// that is some nine tiles for each core of an M4 Max, one after the other: with fewer the last ones would leave most
// cores idle for a larger share of the time.
inline constexpr uint64_t kHistoryBytes = 1ull << 30;

// Tiles are searched in parts, each of at least one tile, where they need more history.
Plan plan_viterbi(const ViterbiCall& call, int64_t tiles, uint64_t history_bytes = kHistoryBytes);

}  // namespace mlx_marlin
