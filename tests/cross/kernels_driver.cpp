// Runs cases from a file through the CPU kernels and writes the results to another. The tests build it
// for a foreign CPU: argv = instruction set, cases, results.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"

using namespace mlx_marlin::cpu;

namespace {

FILE* open_file(const char* path, const char* mode) {
  FILE* file = std::fopen(path, mode);
  if (!file) {
    std::perror(path);
    std::exit(1);
  }
  return file;
}

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
    return {codes.data(), offsets.data(), formats.data(), suh.data(), svh.data(), bias.empty() ? nullptr : bias.data(),
            sizes[0],     sizes[1],       sizes[2]};
  }
};

template <typename T>
void write(FILE* file, const std::vector<T>& items) {
  std::fwrite(items.data(), sizeof(T), items.size(), file);
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
  const Config config{64, 128, 2};
  const auto counts = in.array<int32_t>();  // decodes, products, swiglus
  for (int i = 0; i < counts[0]; ++i) {
    OwnedStack stack(in);
    std::vector<uint16_t> weights(static_cast<size_t>(stack.sizes[1]) * stack.sizes[2]);
    decode(stack.view(), 0, weights.data(), 2);
    write(out, weights);
  }
  for (int i = 0; i < counts[1]; ++i) {
    OwnedStack stack(in);
    auto p = in.array<int32_t>();  // rows, transposed
    auto x = in.array<float>();
    int k = stack.sizes[1], n = stack.sizes[2];
    std::vector<float> y(static_cast<size_t>(p[0]) * (p[1] ? k : n));
    product({DType::float32, x.data(), y.data(), p[0], nullptr, 1, k, n, p[1] != 0, stack.view()}, config);
    write(out, y);
  }
  for (int i = 0; i < counts[2]; ++i) {
    OwnedStack gate(in), up(in), down(in);
    auto p = in.array<int32_t>();  // rows, top_k, activation
    auto x = in.array<float>();
    auto ids = in.array<uint32_t>();
    auto scores = in.array<float>();
    int hidden = gate.sizes[1];
    std::vector<float> y(static_cast<size_t>(p[0]) * hidden);
    swiglu(
        {DType::float32, x.data(), ids.data(), scores.data(), y.data(), p[0], p[1], hidden, p[2], 1.702f, 7.0f,
         gate.view(), up.view(), down.view()},
        config);
    write(out, y);
  }
  return std::fclose(out) == 0 ? 0 : 1;
}
