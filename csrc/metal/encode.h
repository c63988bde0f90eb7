// Encodes a call's Plan into MLX's command encoder. encode.cpp is the Metal version, unavailable.cpp
// stands in where there is none.
#pragma once

#include <vector>

#include "call.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlx_marlin::metal {

namespace mx = mlx::core;

void encode_linear(const LinearCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out);

void encode_swiglu(const SwigluCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out);

void encode_decode(const DecodeCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out);

void encode_embedding(
    const EmbeddingCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out);

void encode_viterbi(const ViterbiCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out);

}  // namespace mlx_marlin::metal
