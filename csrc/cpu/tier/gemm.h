// Products with the inner matrix. Included by table.cpp only.
//
// A tile is decoded into vectors that lie along its columns (cpu/simd: kChains accumulators hold all 16
// columns, kSteps vectors of x cover all 16 rows), so that neither weights nor activations are
// transposed; the lanes of an accumulator are summed once, after the last tile.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

constexpr int kGroups = 8;  // of two columns, 8 apart
constexpr int kGroupChains = kChains / kGroups;
constexpr int kGroupVectors = kSteps * kGroupChains;
constexpr int kTileVectors = kGroups * kGroupVectors;

// Tile rows per sweep: 16 tiles of x (1 KB per row) and of decoded weights (16 KB) stay in the L1 cache.
constexpr int kSweep = 16;

// x is stored in blocks of rows, tile by tile: a tile's 16 values of every row of the block lie
// together. Rows apart by a power of two would all fall into the same set of the L1 cache.
static int block_rows(int rows, int panel_rows) {
  if (panel_rows >= kPanelRows && rows >= kPanelRows) {
    return kPanelBlock;
  }
  int most = panel_rows < kPanelRows ? panel_rows : kPanelRows - 1;
  return rows < most ? rows : most;
}

static int64_t row_floats(int k) {
  return k;
}

// The block of `count` rows that begins at row `first`, from tile `tile_row` on.
MARLIN_INLINE const float* block_at(const float* x, int first, int count, int k, int tile_row) {
  return x + static_cast<int64_t>(first) * k + tile_row * count * MARLIN_TILE;
}

// A tile that is decoded later: the tiles of a column lie a matrix row apart, which no hardware prefetcher follows across
// pages.
MARLIN_INLINE void prefetch_tile(const uint8_t* tile, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) {
    __builtin_prefetch(tile + b);
  }
  __builtin_prefetch(tile + bytes - 1);  // half rates: a tile of 48 or 112 bytes may end in a line of its own
}

// Tile columns between prefetching and decoding. One is not enough: a vector of codes that begins in a tile ends in the
// next one, and is waited for even where that part is masked out.
constexpr int kAhead = 2;

// Groups whose accumulators stay in registers while ROWS rows share a decoded group.
template <int ROWS>
constexpr int kSweepGroups = ROWS <= 2 ? 8 / ROWS
    : ROWS <= 4                        ? 2
                                       : 1;

// Whether the next eight groups are packed one by one, each in the place of one that was multiplied: shuffles and
// integers then find work beside the floats all the time. With one group of a tile at a time it takes longer.
template <int ROWS>
constexpr bool kInterleaved = ROWS >= kInterleavedRows && kSweepGroups<ROWS> > 1;

// acc += x * the weights of group GROUP of those that a sweep multiplies, for ROWS rows.
template <int ROWS, int GROUP, int CODEBOOK>
MARLIN_INLINE void multiply_group(
    const Decoder<CODEBOOK>& decoder, const Packed<CODEBOOK>& packed, const float* x, V* acc) {
  constexpr int chains = kSweepGroups<ROWS> * kGroupChains;
  V w[kGroupVectors];
  decoder.unpack(packed, w);
  unroll<kSteps>([&](auto s) MARLIN_LAMBDA {
    unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
      V value = load_step(x + r * MARLIN_TILE, s);
      unroll<kGroupChains>([&](auto c) MARLIN_LAMBDA {
        V& sum = acc[r * chains + GROUP * kGroupChains + c];
        sum = fma(w[s * kGroupChains + c], value, sum);
      });
    });
  });
}

// sums[row * kChains + chain] += x * tiles for chains of groups [first, first + kSweepGroups).
//
// Eight groups are packed before the first of them is unpacked and multiplied: the chain from the codes
// to a weight is some 40 cycles long, and a scheduler full of waiting multiplications sees no further.
template <int CODEBOOK, int ROWS, bool FIRST>
static void sweep(
    const Decoder<CODEBOOK>& decoder, const uint8_t* tile, int64_t stride, int64_t ahead, int tiles, const float* x,
    int first, V* sums) {
  constexpr int groups = kSweepGroups<ROWS>;
  constexpr int depth = kGroups / groups;  // divides the number of tiles, a multiple of 8
  constexpr int chains = groups * kGroupChains;
  V acc[ROWS * chains];
  sums += first * kGroupChains;
  unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
    unroll<chains>([&](auto c) MARLIN_LAMBDA { acc[r * chains + c] = sums[r * kChains + c]; });
  });
  Packed<CODEBOOK> packed[kGroups];
  for (int t = 0; t < tiles; t += depth) {
    for (int d = 0; d < depth; ++d, tile += stride) {
      if constexpr (FIRST) {
        prefetch_tile(tile + ahead, decoder.bytes());
      }
      unroll<groups>([&](auto g) MARLIN_LAMBDA {
        decoder.template pack<FIRST && g == 0>(tile, first + g, packed[d * groups + g]);
      });
    }
    if constexpr (kInterleaved<ROWS>) {
      for (; t + depth < tiles; t += depth) {
        for (int d = 0; d < depth; ++d, tile += stride, x += ROWS * MARLIN_TILE) {
          if constexpr (FIRST) {
            prefetch_tile(tile + ahead, decoder.bytes());
          }
          unroll<groups>([&](auto g) MARLIN_LAMBDA {
            multiply_group<ROWS, g>(decoder, packed[d * groups + g], x, acc);
            decoder.template pack<FIRST && g == 0>(tile, first + g, packed[d * groups + g]);
          });
        }
      }
    }
    for (int d = 0; d < depth; ++d, x += ROWS * MARLIN_TILE) {
      unroll<groups>([&](auto g) MARLIN_LAMBDA { multiply_group<ROWS, g>(decoder, packed[d * groups + g], x, acc); });
    }
  }
  unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
    unroll<chains>([&](auto c) MARLIN_LAMBDA { sums[r * kChains + c] = acc[r * chains + c]; });
  });
}

template <int CODEBOOK, int ROWS>
static void sweep_tile(
    const Decoder<CODEBOOK>& decoder, const uint8_t* tile, int64_t stride, int64_t ahead, int tiles, const float* x,
    V* sums) {
  sweep<CODEBOOK, ROWS, true>(decoder, tile, stride, ahead, tiles, x, 0, sums);
  if constexpr (kSweepGroups<ROWS> < kGroups) {
    for (int g = kSweepGroups<ROWS>; g < kGroups; g += kSweepGroups<ROWS>) {
      sweep<CODEBOOK, ROWS, false>(decoder, tile, stride, ahead, tiles, x, g, sums);
    }
  }
}

// rows in [1, ROWS].
template <int CODEBOOK, int ROWS>
static void sweep_rows(
    const Decoder<CODEBOOK>& decoder, const uint8_t* tile, int64_t stride, int64_t ahead, int tiles, const float* x,
    int rows, V* sums) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) {
      return sweep_rows<CODEBOOK, ROWS - 1>(decoder, tile, stride, ahead, tiles, x, rows, sums);
    }
    sweep_tile<CODEBOOK, ROWS>(decoder, tile, stride, ahead, tiles, x, sums);
  }
}

// panel[tile][step][chain]. From each tile on, `ahead` bytes away, `ahead_bytes` are prefetched.
template <int CODEBOOK>
static void decode_panel(
    const Decoder<CODEBOOK>& decoder, const uint8_t* tile, int64_t stride, int tiles, int64_t ahead,
    int64_t ahead_bytes, V* panel) {
  Packed<CODEBOOK> packed[kGroups];
  for (int t = 0; t < tiles; ++t, tile += stride, panel += kTileVectors) {
    prefetch_tile(tile + ahead, ahead_bytes);
    decoder.template pack<true>(tile, 0, packed[0]);
    for (int g = 1; g < kGroups; ++g) {
      decoder.template pack<false>(tile, g, packed[g]);
    }
    for (int g = 0; g < kGroups; ++g) {
      V w[kGroupVectors];
      decoder.unpack(packed[g], w);
      unroll<kGroupVectors>([&](auto i) MARLIN_LAMBDA {
        panel[i / kGroupChains * kChains + g * kGroupChains + i % kGroupChains] = w[i];
      });
    }
  }
}

template <int ROWS>
static void multiply_panel(const V* panel, int tiles, const float* x, V* sums) {
  V acc[ROWS * kPanelChains];
  unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
    unroll<kPanelChains>([&](auto c) MARLIN_LAMBDA { acc[r * kPanelChains + c] = sums[r * kChains + c]; });
  });
  for (int t = 0; t < tiles; ++t, panel += kTileVectors, x += ROWS * MARLIN_TILE) {
    unroll<kSteps>([&](auto s) MARLIN_LAMBDA {
      V w[kPanelChains];
      unroll<kPanelChains>([&](auto c) MARLIN_LAMBDA { w[c] = panel[s * kChains + c]; });
      unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
        V value = load_step(x + r * MARLIN_TILE, s);
        unroll<kPanelChains>(
            [&](auto c) MARLIN_LAMBDA { acc[r * kPanelChains + c] = fma(w[c], value, acc[r * kPanelChains + c]); });
      });
    });
  }
  unroll<ROWS>([&](auto r) MARLIN_LAMBDA {
    unroll<kPanelChains>([&](auto c) MARLIN_LAMBDA { sums[r * kChains + c] = acc[r * kPanelChains + c]; });
  });
}

// A block of rows (a few KB) meets all chains of the panel while it is in the L1 cache.
template <int ROWS>
static void multiply_panel_block(const V* panel, int tiles, const float* x, V* sums) {
  for (int c = 0; c < kChains; c += kPanelChains) {
    multiply_panel<ROWS>(panel + c, tiles, x, sums + c);
  }
}

// rows in [0, ROWS].
template <int ROWS>
static void multiply_panel_tail(const V* panel, int tiles, const float* x, int rows, V* sums) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) {
      return multiply_panel_tail<ROWS - 1>(panel, tiles, x, rows, sums);
    }
    multiply_panel_block<ROWS>(panel, tiles, x, sums);
  }
}

// x: the segment's rows; tile_row: the first tile of the sweep.
static void multiply_panel_rows(const V* panel, int tile_row, int tiles, const float* x, int k, int rows, V* sums) {
  int r = 0;
  for (; r + kPanelBlock <= rows; r += kPanelBlock, sums += kPanelBlock * kChains) {
    multiply_panel_block<kPanelBlock>(panel, tiles, block_at(x, r, kPanelBlock, k, tile_row), sums);
  }
  multiply_panel_tail<kPanelBlock - 1>(panel, tiles, block_at(x, r, rows - r, k, tile_row), rows - r, sums);
}

static void write_sums(const V* sums, int rows, float* y, int64_t ldy) {
  for (int r = 0; r < rows; ++r, y += ldy, sums += kChains) {
    sum_chains(sums, y);
  }
}

// Few rows: the weights go from the decoder's registers straight into the sums.
template <int CODEBOOK>
static void multiply_few(
    const Codes& codes, const float* x, int rows, int column, int columns, float* y, int64_t ldy, V* sums) {
  Decoder<CODEBOOK> decoder(codes);
  const int64_t bytes = tile_bytes(codes.half_bits);
  const int64_t stride = codes.n / MARLIN_TILE * bytes;
  const int tile_rows = codes.k / MARLIN_TILE, tile_columns = columns / MARLIN_TILE;
  const uint8_t* block = codes.tiles + column / MARLIN_TILE * bytes;
  std::memset(sums, 0, sizeof(V) * rows * kChains * tile_columns);
  for (int t = 0; t < kSweep && t < tile_rows; ++t) {
    prefetch_tile(block + t * stride, kAhead * bytes);
  }
  for (int t = 0; t < tile_rows; t += kSweep, block += kSweep * stride) {
    int tiles = tile_rows - t < kSweep ? tile_rows - t : kSweep;
    for (int c = 0; c < tile_columns; ++c) {
      // Behind the last column of a sweep comes the first of the next sweep.
      int64_t ahead = kAhead * bytes + (c + kAhead < tile_columns ? 0 : kSweep * stride - tile_columns * bytes);
      sweep_rows<CODEBOOK, kPanelRows - 1>(
          decoder, block + c * bytes, stride, ahead, tiles, block_at(x, 0, rows, codes.k, t), rows,
          sums + c * rows * kChains);
    }
  }
  for (int c = 0; c < tile_columns; ++c) {
    write_sums(sums + c * rows * kChains, rows, y + c * MARLIN_TILE, ldy);
  }
}

// Many rows: a sweep of one tile column is decoded once, into the L1 cache, for all rows.
template <int CODEBOOK>
static void multiply_many(
    const Codes& codes, const float* x, int rows, int column, int columns, float* y, int64_t ldy, V* sums) {
  Decoder<CODEBOOK> decoder(codes);
  const int64_t bytes = tile_bytes(codes.half_bits);
  const int64_t stride = codes.n / MARLIN_TILE * bytes;
  const int tile_rows = codes.k / MARLIN_TILE;
  V panel[kSweep * kTileVectors];
  for (int c = 0; c < columns; c += MARLIN_TILE) {
    const uint8_t* tile = codes.tiles + (column + c) / MARLIN_TILE * bytes;
    std::memset(sums, 0, sizeof(V) * rows * kChains);
    // The first column fetches the next sweep of itself and of those that its own sweeps do not fetch for.
    const int64_t ahead = c == 0 ? kSweep * stride : kAhead * bytes;
    const int64_t ahead_bytes = c == 0 ? (kAhead + 1) * bytes : bytes;
    for (int t = 0; t < tile_rows; t += kSweep, tile += kSweep * stride) {
      int tiles = tile_rows - t < kSweep ? tile_rows - t : kSweep;
      decode_panel(decoder, tile, stride, tiles, ahead, ahead_bytes, panel);
      multiply_panel_rows(panel, t, tiles, x, codes.k, rows, sums);
    }
    write_sums(sums, rows, y + c, ldy);
  }
}

template <int CODEBOOK>
static void multiply_codebook(
    const Codes& codes, const float* x, int rows, int column, int columns, int panel_rows, float* y, int64_t ldy,
    V* sums) {
  if (panel_rows >= kPanelRows && rows >= kPanelRows) {
    return multiply_many<CODEBOOK>(codes, x, rows, column, columns, y, ldy, sums);
  }
  int most = block_rows(rows, panel_rows);
  for (int r = 0; r < rows; r += most) {
    int count = rows - r < most ? rows - r : most;
    multiply_few<CODEBOOK>(codes, block_at(x, r, count, codes.k, 0), count, column, columns, y + r * ldy, ldy, sums);
  }
}

static int64_t multiply_scratch(int rows, int columns) {
  int few = rows < kPanelRows ? rows : kPanelRows - 1;
  int64_t vectors = static_cast<int64_t>(few) * kChains * (columns / MARLIN_TILE);
  int64_t many = static_cast<int64_t>(rows) * kChains;
  return (vectors > many ? vectors : many) * kLanes;
}

static void multiply(
    const Codes& codes, float* x, int rows, int column, int columns, int panel_rows, float* y, int64_t ldy,
    float* scratch) {
  V* sums = reinterpret_cast<V*>(scratch);
  switch (codes.codebook) {
    case MARLIN_CODEBOOK_3INST:
      return multiply_codebook<MARLIN_CODEBOOK_3INST>(codes, x, rows, column, columns, panel_rows, y, ldy, sums);
    case MARLIN_CODEBOOK_MCG:
      return multiply_codebook<MARLIN_CODEBOOK_MCG>(codes, x, rows, column, columns, panel_rows, y, ldy, sums);
    case MARLIN_CODEBOOK_MUL1:
      return multiply_codebook<MARLIN_CODEBOOK_MUL1>(codes, x, rows, column, columns, panel_rows, y, ldy, sums);
  }
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
