// Stands in for encode.cpp where MLX was built without Metal.
#include "metal/encode.h"

#include <stdexcept>
#include <string>

#include "metal/shaders.h"

namespace mlx_marlin::metal {

namespace {

[[noreturn]] void refuse(const char* op) {
  throw std::runtime_error(std::string("[") + op + "] this build of mlx_marlin has no Metal; run it on a CPU stream.");
}

}  // namespace

void set_shaders(std::unordered_map<std::string, std::string>) {
  refuse("set_shaders");
}

void encode_linear(const LinearCall&, mx::Stream, const std::vector<mx::array>&, mx::array&) {
  refuse("trellis_linear");
}

void encode_swiglu(const SwigluCall& call, mx::Stream, const std::vector<mx::array>&, mx::array&) {
  refuse(call.name());
}

void encode_decode(const DecodeCall&, mx::Stream, const std::vector<mx::array>&, mx::array&) {
  refuse("trellis_decode");
}

void encode_embedding(const EmbeddingCall&, mx::Stream, const std::vector<mx::array>&, mx::array&) {
  refuse("trellis_embedding");
}

void encode_viterbi(const ViterbiCall&, mx::Stream, const std::vector<mx::array>&, mx::array&) {
  refuse("trellis_viterbi");
}

}  // namespace mlx_marlin::metal
