// Runs cases from a file through the CPU kernels and writes the results to another. The tests build it
// for a foreign CPU: argv = instruction set, cases, results.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "open_file.h"

using namespace mlx_marlin::cpu;

namespace {

struct Reader {
  FILE* file;

  // An array: its length as int64, then its items.
  template <typename T>
  std::vector<T> array() {
    int64_t count = 0;
    if (std::fread(&count, sizeof(count), 1, file) != 1) {
      std::fprintf(stderr, "the case file ends early\n");
      std::exit(1);
    }
    std::vector<T> items(count);
    if (std::fread(items.data(), sizeof(T), count, file) != static_cast<size_t>(count)) {
      std::fprintf(stderr, "the case file ends early\n");
      std::exit(1);
    }
    return items;
  }
};

struct OwnedStack {
  std::vector<int32_t> sizes;  // experts, k, n
  std::vector<uint32_t> codes;
  std::vector<int64_t> offsets;
  std::vector<uint32_t> formats;
  std::vector<uint16_t> suh, svh;
  std::vector<float> bias;

  explicit OwnedStack(Reader& in)
      : sizes(in.array<int32_t>()),
        codes(in.array<uint32_t>()),
        offsets(in.array<int64_t>()),
        formats(in.array<uint32_t>()),
        suh(in.array<uint16_t>()),
        svh(in.array<uint16_t>()),
        bias(in.array<float>()) {}

  Stack view() const {
    return {
        .codes = codes.data(),
        .offsets = offsets.data(),
        .formats = formats.data(),
        .suh = suh.data(),
        .svh = svh.data(),
        .bias = bias.empty() ? nullptr : bias.data(),
        .experts = sizes[0],
        .k = sizes[1],
        .n = sizes[2]};
  }
};

template <typename T>
void write(FILE* file, const std::vector<T>& items) {
  std::fwrite(items.data(), sizeof(T), items.size(), file);
}

size_t item_bytes(int dtype) {
  return static_cast<DType>(dtype) == DType::float32 ? 4 : 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s INSTRUCTION_SET CASES RESULTS\n", argv[0]);
    return 2;
  }
  set_instruction_set(argv[1]);
  set_threads(2);
  Reader in{open_file(argv[2], "rb")};
  FILE* out = open_file(argv[3], "wb");
  const auto counts = in.array<int32_t>();  // decodes, products, swiglus
  for (int i = 0; i < counts[0]; ++i) {
    OwnedStack stack(in);
    std::vector<uint16_t> weights(static_cast<size_t>(stack.sizes[1]) * stack.sizes[2]);
    decode(stack.view(), 0, weights.data(), 2);
    write(out, weights);
  }
  for (int i = 0; i < counts[1]; ++i) {
    OwnedStack stack(in);
    const auto p = in.array<int32_t>();  // dtype, panel rows, rows, in_features, out_features, transposed
    const auto x = in.array<uint8_t>();
    std::vector<uint8_t> y(static_cast<size_t>(p[2]) * (p[5] ? p[3] : p[4]) * item_bytes(p[0]));
    const ProductArgs args{
        .dtype = static_cast<DType>(p[0]),
        .x = x.data(),
        .y = y.data(),
        .rows = p[2],
        .ids = nullptr,
        .x_divisor = 1,
        .in_features = p[3],
        .out_features = p[4],
        .transposed = p[5] != 0,
        .stack = stack.view()};
    product(args, {p[1], 128, 2});
    write(out, y);
  }
  for (int i = 0; i < counts[2]; ++i) {
    OwnedStack gate(in), up(in), down(in);
    const auto p = in.array<int32_t>();  // dtype, panel rows, rows, hidden, top_k, activation
    const auto x = in.array<uint8_t>();
    const auto ids = in.array<uint32_t>();
    const auto scores = in.array<float>();  // empty: not combined
    const size_t out_rows = static_cast<size_t>(p[2]) * (scores.empty() ? p[4] : 1);
    std::vector<uint8_t> y(out_rows * p[3] * item_bytes(p[0]));
    const SwigluArgs args{
        .dtype = static_cast<DType>(p[0]),
        .x = x.data(),
        .ids = ids.data(),
        .scores = scores.empty() ? nullptr : scores.data(),
        .out = y.data(),
        .rows = p[2],
        .top_k = p[4],
        .hidden = p[3],
        .activation = p[5],
        .alpha = 1.702f,
        .limit = 7.0f,
        .gate = gate.view(),
        .up = up.view(),
        .down = down.view()};
    swiglu(args, {p[1], 128, 2});
    write(out, y);
  }
  return std::fclose(out) == 0 ? 0 : 1;
}
