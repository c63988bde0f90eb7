// What one call asks for: the attributes of the primitives. Plain data, comparable, no MLX and no GPU headers.
#pragma once

#include <cstdint>

namespace mlx_marlin {

// kernels.VARIANTS, by position.
enum class Variant { decode, prefill4, base, large_batch };

// kernels.KernelConfig as integers.
struct KernelConfig {
  Variant variant;
  int tile_size_m;
  int tile_size_n;
  int simdgroups;
  bool use_fp32_acc;

  bool operator==(const KernelConfig&) const = default;
};

// Sizes and contents of one projection's stacked weights (weights.ExpertStack).
struct StackInfo {
  int experts;
  int k;  // padded input size
  int n;  // padded output size
  bool bias;
  uint32_t widths;     // bit 2 * K is set where an expert has K bits per weight
  uint32_t codebooks;  // bit c is set where an expert has codebook c

  bool operator==(const StackInfo&) const = default;

  // Arrays that a stack adds to a primitive's inputs: codes, offsets, formats, suh, svh and the bias.
  int num_arrays() const {
    return bias ? 6 : 5;
  }
};

// y[r] = x[r / x_divisor] W(ids[r]) + bias; transposed: with W^T and without bias.
struct LinearCall {
  int in_features;  // logical sizes of W
  int out_features;
  int x_divisor;  // rows of y per row of x; a primitive sets it at evaluation, from the sizes of its inputs
  bool gathered;  // ids are given; otherwise expert 0
  bool transposed;
  StackInfo stack;
  KernelConfig config;

  bool operator==(const LinearCall&) const = default;

  int x_size() const {
    return transposed ? out_features : in_features;
  }
  int y_size() const {
    return transposed ? in_features : out_features;
  }
  int64_t size() const {
    return int64_t(stack.k) * stack.n;
  }
};

// The experts of a layer: down(act(gate(x)) * up(x)), or without a gate down(act(up(x))).
struct SwigluCall {
  int hidden;
  int activation;  // MARLIN_ACTIVATION_*
  float alpha;
  float limit;
  bool combine;  // scores are given
  bool gated;    // otherwise `gate` is empty
  StackInfo gate;
  StackInfo up;
  StackInfo down;
  KernelConfig config;
  bool absent = false;  // an index of up.experts, one too large, is an expert that is not here: zeros

  bool operator==(const SwigluCall&) const = default;

  const char* name() const {
    return gated ? "trellis_swiglu" : "trellis_mlp";
  }
  int64_t size() const {
    return int64_t(up.k) * up.n;
  }
  // Products of x: gate and up, or up.
  int side_by_side() const {
    return gated ? 2 : 1;
  }
  // visit(name, stack) for each projection, in the order of a primitive's inputs.
  template <class Visit>
  void each_stack(const Visit& visit) const {
    if (gated) {
      visit("gate", gate);
    }
    visit("up", up);
    visit("down", down);
  }
};

struct DecodeCall {
  int expert;
  StackInfo stack;

  bool operator==(const DecodeCall&) const = default;
};

// Rows of a quantized token embedding.
struct EmbeddingCall {
  int rows;      // of the table: the vocabulary
  int features;  // elements of a row
  int bits;      // per element, 1 to 8

  bool operator==(const EmbeddingCall&) const = default;
};

// The encoder's search for the states of tiles.
struct ViterbiCall {
  int half_bits;
  int codebook;

  bool operator==(const ViterbiCall&) const = default;
};

// Attention on the CPU.
struct AttentionCall {
  float scale;
  bool causal;
  bool masked;  // a mask is given
  bool sinks;   // they are given

  bool operator==(const AttentionCall&) const = default;
};

}  // namespace mlx_marlin
