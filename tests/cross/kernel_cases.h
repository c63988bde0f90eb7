// Cases of the CPU kernels from a file, as tests/cross/test_neon.py writes them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "open_file.h"

namespace mlx_marlin::cpu {

// Columns per task: two or more tasks in most of the cases.
constexpr int kTaskColumns = 128;

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
    if (count && std::fread(items.data(), sizeof(T), count, file) != static_cast<size_t>(count)) {
      std::fprintf(stderr, "the case file ends early\n");
      std::exit(1);
    }
    return items;
  }
};

inline size_t item_bytes(int dtype) {
  return static_cast<DType>(dtype) == DType::float32 ? 4 : 2;
}

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

// Expert 0 as a matrix of halves.
struct DecodeCase {
  OwnedStack stack;

  explicit DecodeCase(Reader& in) : stack(in) {}

  std::vector<uint8_t> run(int threads) const {
    std::vector<uint16_t> weights(static_cast<size_t>(stack.sizes[1]) * stack.sizes[2]);
    decode(stack.view(), 0, weights.data(), threads);
    const auto* bytes = reinterpret_cast<const uint8_t*>(weights.data());
    return {bytes, bytes + 2 * weights.size()};
  }
};

struct ProductCase {
  OwnedStack stack;
  std::vector<int32_t> sizes;  // dtype, panel rows, rows, in_features, out_features, transposed, x_divisor, integers
  std::vector<uint32_t> ids;   // empty: expert 0
  std::vector<uint8_t> x;

  explicit ProductCase(Reader& in)
      : stack(in), sizes(in.array<int32_t>()), ids(in.array<uint32_t>()), x(in.array<uint8_t>()) {}

  std::vector<uint8_t> run(int threads) const {
    const bool transposed = sizes[5] != 0;
    std::vector<uint8_t> y(static_cast<size_t>(sizes[2]) * sizes[transposed ? 3 : 4] * item_bytes(sizes[0]));
    const ProductArgs args{
        .dtype = static_cast<DType>(sizes[0]),
        .x = x.data(),
        .y = y.data(),
        .rows = sizes[2],
        .ids = ids.empty() ? nullptr : ids.data(),
        .x_divisor = sizes[6],
        .in_features = sizes[3],
        .out_features = sizes[4],
        .transposed = transposed,
        .stack = stack.view()};
    product(args, {sizes[1], kTaskColumns, threads, sizes[7] != 0});
    return y;
  }
};

struct SwigluCase {
  OwnedStack gate, up, down;   // gate without experts where there is none
  std::vector<int32_t> sizes;  // dtype, panel rows, rows, hidden, top_k, activation, combine, integers
  std::vector<uint8_t> x;
  std::vector<uint32_t> ids;
  std::vector<float> scores;  // of every slot, where they are combined
  bool combine;

  explicit SwigluCase(Reader& in)
      : gate(in),
        up(in),
        down(in),
        sizes(in.array<int32_t>()),
        x(in.array<uint8_t>()),
        ids(in.array<uint32_t>()),
        scores(in.array<float>()),
        combine(sizes[6] != 0) {}

  std::vector<uint8_t> run(int threads) const {
    const size_t out_rows = static_cast<size_t>(sizes[2]) * (combine ? 1 : sizes[4]);
    std::vector<uint8_t> y(out_rows * sizes[3] * item_bytes(sizes[0]));
    const SwigluArgs args{
        .dtype = static_cast<DType>(sizes[0]),
        .x = x.data(),
        .ids = ids.data(),
        .scores = combine ? scores.data() : nullptr,
        .out = y.data(),
        .rows = sizes[2],
        .top_k = sizes[4],
        .hidden = sizes[3],
        .activation = sizes[5],
        .alpha = 1.702f,
        .limit = 7.0f,
        .gate = gate.sizes[0] != 0 ? gate.view() : Stack{},
        .up = up.view(),
        .down = down.view()};
    swiglu(args, {sizes[1], kTaskColumns, threads, sizes[7] != 0});
    return y;
  }
};

struct AttentionCase {
  std::vector<int32_t>
      sizes;  // dtype, batches, heads, repeats, queries, keys, key size, value size, causal, mask is bool
  std::vector<float> scale;  // one number
  std::vector<uint8_t> queries, keys, values;
  std::vector<uint8_t> mask;  // of every score, or empty
  std::vector<float> sinks;   // or empty

  explicit AttentionCase(Reader& in)
      : sizes(in.array<int32_t>()),
        scale(in.array<float>()),
        queries(in.array<uint8_t>()),
        keys(in.array<uint8_t>()),
        values(in.array<uint8_t>()),
        mask(in.array<uint8_t>()),
        sinks(in.array<float>()) {}

  static Heads dense(const std::vector<uint8_t>& data, int64_t heads, int64_t positions, int64_t size) {
    return {data.empty() ? nullptr : data.data(), {heads * positions * size, positions * size, size, 1}};
  }

  std::vector<uint8_t> run(int threads) const {
    const int query_heads = sizes[2] * sizes[3];
    std::vector<uint8_t> y(static_cast<size_t>(sizes[1]) * query_heads * sizes[4] * sizes[7] * item_bytes(sizes[0]));
    const AttentionArgs args{
        .dtype = static_cast<DType>(sizes[0]),
        .queries = dense(queries, query_heads, sizes[4], sizes[6]),
        .keys = dense(keys, sizes[2], sizes[5], sizes[6]),
        .values = dense(values, sizes[2], sizes[5], sizes[7]),
        .mask = dense(mask, query_heads, sizes[4], sizes[5]),
        .mask_is_bool = sizes[9] != 0,
        .causal = sizes[8] != 0,
        .sinks = sinks.empty() ? nullptr : sinks.data(),
        .out = y.data(),
        .batches = sizes[1],
        .heads = sizes[2],
        .repeats = sizes[3],
        .query_count = sizes[4],
        .key_count = sizes[5],
        .key_size = sizes[6],
        .value_size = sizes[7],
        .scale = scale[0]};
    attention(args, threads);
    return y;
  }
};

// Ids of which some may be out of range of the experts.
struct IdsCase {
  std::vector<uint32_t> ids;
  std::vector<int32_t> experts;  // one number

  explicit IdsCase(Reader& in) : ids(in.array<uint32_t>()), experts(in.array<int32_t>()) {}

  // Where the largest wrong one is, or -1, as int64.
  std::vector<uint8_t> run(int) const {
    const int64_t found = find_bad_id(ids.data(), static_cast<int64_t>(ids.size()), experts[0]);
    const auto* bytes = reinterpret_cast<const uint8_t*>(&found);
    return {bytes, bytes + sizeof(found)};
  }
};

// All cases of a file, in its order.
struct KernelCases {
  std::vector<DecodeCase> decodes;
  std::vector<ProductCase> products;
  std::vector<SwigluCase> swiglus;
  std::vector<IdsCase> ids;
  std::vector<AttentionCase> attentions;

  explicit KernelCases(const char* path) {
    Reader in{open_file(path, "rb")};
    const auto counts = in.array<int32_t>();
    read(in, decodes, counts[0]);
    read(in, products, counts[1]);
    read(in, swiglus, counts[2]);
    read(in, ids, counts[3]);
    read(in, attentions, counts[4]);
    std::fclose(in.file);
  }

  // visit(case) for each.
  template <typename Visit>
  void each(Visit visit) const {
    for (const auto& one : decodes) {
      visit(one);
    }
    for (const auto& one : products) {
      visit(one);
    }
    for (const auto& one : swiglus) {
      visit(one);
    }
    for (const auto& one : ids) {
      visit(one);
    }
    for (const auto& one : attentions) {
      visit(one);
    }
  }

 private:
  template <typename Case>
  static void read(Reader& in, std::vector<Case>& cases, int count) {
    for (int i = 0; i < count; ++i) {
      cases.emplace_back(in);
    }
  }
};

}  // namespace mlx_marlin::cpu
