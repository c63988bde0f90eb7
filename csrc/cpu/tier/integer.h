// Products with mul1 by sums of integers: the byte sum of a weight's hash, exact in 16 bits, times x rounded to 16 bits.
// Included by table.cpp only. The reference of the rounding is ops/reference.py: integer_linear.
//
// A value of mul1 is scale * sum + offset before its rounding to a half, which is left out here. x is rounded once it is
// rotated, with one scale per Hadamard block: largest magnitude 32767, to nearest even. One block of one column is at
// most 1020 * 32768 * 128 < 2^32 in all, and a lane has a fourth of it or less: no sum of 32 bits overflows. Blocks add
// up in float32.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

constexpr int kBlockTiles = MARLIN_HADAMARD_SIZE / MARLIN_TILE;
constexpr int kLargestInteger = 32767;
// Blocks without a larger value are rounded as if they had this one: the inverse of its scale is still finite.
constexpr float kLeastMaximum = 0x1p-100f;

// Rows that share the words of a panel in registers, and words of 16 bits that a tile of one row takes.
constexpr int kIntegerBlock = 6;
constexpr int kRowWords = MARLIN_TILE * kCopies;

constexpr int kGroupWords = 32 / kWords;             // vectors of words of a group
constexpr int kWordVectors = kGroups * kGroupWords;  // of a tile
constexpr int kWordSums = kGroups * kGroupSums;      // vectors of sums of a row

// What a row's block of 128 adds: sum * scale + offset.
struct BlockScale {
  float scale;
  float offset;
};

// x lies in blocks of up to kIntegerBlock rows: per tile kRowWords of each row, then the scales, per Hadamard block one of
// each row.
static int64_t integer_row_floats(int k) {
  const int64_t scales = k / MARLIN_HADAMARD_SIZE * (sizeof(BlockScale) / sizeof(float));
  return static_cast<int64_t>(k) * kCopies / 2 + (scales + 15) / 16 * 16;  // whole cache lines
}

struct IntegerRows {
  int16_t* words;
  BlockScale* scales;
  int rows;

  // Those of the block of rows that row `first` of a segment begins.
  IntegerRows(float* segment, int first, int rows_of_segment, int k)
      : words(reinterpret_cast<int16_t*>(segment + first * integer_row_floats(k))),
        rows(rows_of_segment - first < kIntegerBlock ? rows_of_segment - first : kIntegerBlock) {
    scales = reinterpret_cast<BlockScale*>(words + static_cast<int64_t>(rows) * k * kCopies);
  }
};

// x: one block in tile order. words: where its tiles begin, `stride` words apart.
static BlockScale round_block(const float* x, int16_t* words, int64_t stride) {
  uint32_t bits[MARLIN_HADAMARD_SIZE];
  std::memcpy(bits, x, sizeof(bits));
  uint32_t most = __builtin_bit_cast(uint32_t, kLeastMaximum);
  for (uint32_t b : bits) {  // as integers magnitudes have the order of floats, and infinity and NaN come last
    const uint32_t magnitude = b & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  float largest = __builtin_bit_cast(float, most);
  largest += 0.0f * largest;  // NaN where it is infinite
  const float inverse = kLargestInteger / largest;
  constexpr float to_integer = 0x1.8p23f;  // adding it leaves the nearest integer in the lower bits
  int16_t rounded[MARLIN_HADAMARD_SIZE];
  int32_t total = 0;
  for (int i = 0; i < MARLIN_HADAMARD_SIZE; ++i) {
    rounded[i] = static_cast<int16_t>(__builtin_bit_cast(uint32_t, x[i] * inverse + to_integer) & 0xffff);
    total += rounded[i];
  }
  for (int t = 0; t < kBlockTiles; ++t) {
    store_words(rounded + t * MARLIN_TILE, words + t * stride);
  }
  constexpr float scale = kMul1Scale / kLargestInteger, offset = kMul1Offset / kLargestInteger;
  return {largest * scale, largest * offset * static_cast<float>(total)};
}

static void rotate_integers(
    DType dtype, const void* x, int count, const uint16_t* scale, int size, const RowPlace& to) {
  const int first = to.row / kIntegerBlock * kIntegerBlock;
  const IntegerRows block(to.segment, first, to.rows, to.k);
  const int64_t stride = static_cast<int64_t>(block.rows) * kRowWords;
  for (int begin = 0; begin < size; begin += MARLIN_HADAMARD_SIZE) {
    alignas(64) float rotated[MARLIN_HADAMARD_SIZE];
    const int values = count - begin < MARLIN_HADAMARD_SIZE ? count - begin : MARLIN_HADAMARD_SIZE;
    const auto* from = static_cast<const char*>(x) + static_cast<int64_t>(begin) * dtype_bytes(dtype);
    rotate_to(dtype, from, values, scale + begin, MARLIN_HADAMARD_SIZE, MARLIN_TILE, rotated);
    const int at = (to.column + begin) / MARLIN_HADAMARD_SIZE;
    int16_t* words = block.words + at * kBlockTiles * stride + (to.row - first) * kRowWords;
    block.scales[at * block.rows + to.row - first] = round_block(rotated, words, stride);
  }
}

// panel[tile][vector of a group][group]: the byte sums of a Hadamard block of one tile column.
static void decode_words(
    const WordDecoder& decoder, const uint8_t* tile, int64_t stride, const uint8_t* next, W* panel) {
  for (int t = 0; t < kBlockTiles; ++t, tile += stride, next += stride, panel += kWordVectors) {
    prefetch_tile(next, decoder.bytes());
    W words[kGroupWords];
    decoder.template words<true>(tile, 0, words);
    unroll<kGroupWords>([&](auto i) MARLIN_LAMBDA { panel[i * kGroups] = words[i]; });
    for (int g = 1; g < kGroups; ++g) {
      decoder.template words<false>(tile, g, words);
      unroll<kGroupWords>([&](auto i) MARLIN_LAMBDA { panel[i * kGroups + g] = words[i]; });
    }
  }
}

// Groups whose sums stay in registers for ROWS rows: a power of two.
template <int ROWS, int GROUPS = kGroups>
constexpr int groups_at_once() {
  if constexpr (GROUPS > 1 && ROWS * GROUPS * kGroupSums > kRegisterSums) {
    return groups_at_once<ROWS, GROUPS / 2>();
  } else {
    return GROUPS;
  }
}

// sums[row][group] += the products with one Hadamard block of ROWS rows.
template <int ROWS>
static void multiply_words(const W* panel, const int16_t* x, const BlockScale* scales, V* sums) {
  constexpr int groups = groups_at_once<ROWS>(), count = groups * kGroupSums;
  for (int first = 0; first < kGroups; first += groups) {
    I acc[ROWS * count] = {};
    const W* words = panel + first;
    const int16_t* values = x;
    for (int t = 0; t < kBlockTiles; ++t, values += ROWS * kRowWords) {
      unroll<kGroupWords>([&](auto i) MARLIN_LAMBDA {
        W w[groups];
        unroll<groups>([&](auto g) MARLIN_LAMBDA { w[g] = words[g]; });
        words += kGroups;
        unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
          const W value = load_words(values + r * kRowWords, i);
          unroll<groups>([&](auto g) MARLIN_LAMBDA { add_products(w[g], value, acc + r * count + g * kGroupSums); });
        });
      });
    }
    unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
      const V scale = set1(scales[r].scale);
      V* to = sums + r * kWordSums + first * kGroupSums;
      unroll<count>([&](auto i) MARLIN_LAMBDA { to[i] = fma(to_floats(acc[r * count + i]), scale, to[i]); });
    });
  }
}

// rows in [1, ROWS].
template <int ROWS>
static void multiply_words_of(int rows, const W* panel, const int16_t* x, const BlockScale* scales, V* sums) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return multiply_words_of<ROWS - 1>(rows, panel, x, scales, sums);
    }
  }
  multiply_words<ROWS>(panel, x, scales, sums);
}

// Rows up to which the columns of a task share a sweep over k, so that codes are read in the order of memory; more rows
// share the words of one column of tiles at a time, so that their sums stay in the L1 cache.
constexpr int kRowsOfAllColumns = 8;

static int columns_at_once(int rows, int columns) {
  return rows <= kRowsOfAllColumns ? columns / MARLIN_TILE : 1;
}

static int64_t integer_scratch(int rows, int columns) {
  const int64_t sums = static_cast<int64_t>(rows) * columns_at_once(rows, columns) * kWordSums * kLanes;
  return sums + (rows + 15) / 16 * 16;
}

// The offsets of a row are the same for all columns.
static void sum_offsets(float* x, int rows, int k, float* offsets) {
  for (int r = 0; r < rows; ++r) {
    const int first = r / kIntegerBlock * kIntegerBlock;
    const IntegerRows block(x, first, rows, k);
    offsets[r] = 0;
    for (int b = 0; b < k / MARLIN_HADAMARD_SIZE; ++b) {
      offsets[r] += block.scales[b * block.rows + r - first].offset;
    }
  }
}

static void multiply_integers(
    const Codes& codes, float* x, int rows, int column, int columns, int, float* y, int64_t ldy, float* scratch) {
  const WordDecoder decoder(codes);
  const int64_t bytes = tile_bytes(codes.half_bits);
  const int64_t stride = codes.n / MARLIN_TILE * bytes;
  const int blocks = codes.k / MARLIN_HADAMARD_SIZE, together = columns_at_once(rows, columns);
  V* sums = reinterpret_cast<V*>(scratch);
  float* offsets = scratch + static_cast<int64_t>(rows) * together * kWordSums * kLanes;
  sum_offsets(x, rows, codes.k, offsets);
  W panel[kBlockTiles * kWordVectors];
  for (int c = 0; c < columns / MARLIN_TILE; c += together) {
    const uint8_t* begin = codes.tiles + (column / MARLIN_TILE + c) * bytes;
    // Steps run over the columns of one Hadamard block, then over those of the next.
    const int steps = blocks * together;
    const auto tile_of = [&](int step) {
      return begin + step / together * kBlockTiles * stride + step % together * bytes;
    };
    std::memset(scratch, 0, sizeof(V) * rows * together * kWordSums);
    for (int step = 0; step < steps; ++step) {
      const int next = step + kAhead < steps ? step + kAhead : steps - 1;
      decode_words(decoder, tile_of(step), stride, tile_of(next), panel);
      const int b = step / together;
      V* to = sums + static_cast<int64_t>(step % together) * rows * kWordSums;
      for (int r = 0; r < rows; r += kIntegerBlock, to += kIntegerBlock * kWordSums) {
        const IntegerRows block(x, r, rows, codes.k);
        const int16_t* words = block.words + static_cast<int64_t>(b) * kBlockTiles * block.rows * kRowWords;
        multiply_words_of<kIntegerBlock>(block.rows, panel, words, block.scales + b * block.rows, to);
      }
    }
    for (int t = 0; t < together; ++t) {
      for (int r = 0; r < rows; ++r) {
        float* out = y + r * ldy + (c + t) * MARLIN_TILE;
        sum_word_chains(sums + (static_cast<int64_t>(t) * rows + r) * kWordSums, out);
        for (int i = 0; i < MARLIN_TILE; ++i) {
          out[i] += offsets[r];
        }
      }
    }
  }
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
