// The transposed product (for gradients) and the decoder itself. Included by table.cpp only.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

// Calls f with a Decoder of the codes' codebook.
template <typename F>
static void with_decoder(const Codes& codes, F&& f) {
  switch (codes.codebook) {
    case MARLIN_CODEBOOK_3INST:
      return f(Decoder<MARLIN_CODEBOOK_3INST>(codes));
    case MARLIN_CODEBOOK_MCG:
      return f(Decoder<MARLIN_CODEBOOK_MCG>(codes));
    case MARLIN_CODEBOOK_MUL1:
      return f(Decoder<MARLIN_CODEBOOK_MUL1>(codes));
  }
}

// Here the vectors lie along the result: each decoded vector times its column's x adds to the step's sum.
static void multiply_transposed(
    const Codes& codes, const float* x, int rows, int column, int columns, float* y, int64_t ldy) {
  const int tile_columns = codes.n / MARLIN_TILE;
  const int64_t bytes = tile_bytes(codes.half_bits);
  with_decoder(codes, [&](const auto& decoder) {
    V panel[kTileVectors];
    for (int c = 0; c < columns; c += MARLIN_TILE) {
      for (int r = 0; r < rows; ++r) {
        std::memset(y + r * ldy + c, 0, MARLIN_TILE * sizeof(float));
      }
      const uint8_t* tile = codes.tiles + static_cast<int64_t>(column + c) / MARLIN_TILE * tile_columns * bytes;
      for (int t = 0; t < tile_columns; ++t, tile += bytes) {
        decode_panel(decoder, tile, bytes, 1, 0, 0, panel);
        for (int r = 0; r < rows; ++r) {
          const float* values = x + static_cast<int64_t>(r) * codes.n + t * MARLIN_TILE;
          V sums[kSteps] = {};
          unroll<kSteps>([&](auto s) MARLIN_LAMBDA {
            unroll<kChains>(
                [&](auto i) MARLIN_LAMBDA { sums[s] = fma(panel[s * kChains + i], load_column(values, i), sums[s]); });
          });
          add_steps(sums, y + r * ldy + c);
        }
      }
      for (int r = 0; r < rows; ++r) {
        float in_order[MARLIN_TILE];
        std::memcpy(in_order, y + r * ldy + c, sizeof(in_order));
        for (int i = 0; i < MARLIN_TILE; ++i) {
          y[r * ldy + c + kTileRows[i]] = in_order[i];
        }
      }
    }
  });
}

static void decode_tile_row(const Codes& codes, int tile_row, uint16_t* out) {
  const int64_t bytes = tile_bytes(codes.half_bits);
  const int tile_columns = codes.n / MARLIN_TILE;
  const uint8_t* tile = codes.tiles + static_cast<int64_t>(tile_row) * tile_columns * bytes;
  with_decoder(codes, [&](const auto& decoder) {
    V panel[kTileVectors];
    for (int t = 0; t < tile_columns; ++t, tile += bytes) {
      decode_panel(decoder, tile, bytes, 1, 0, 0, panel);
      for (int i = 0; i < kTileVectors; ++i) {
        uint16_t values[kLanes];
        store_half(values, panel[i]);
        for (int lane = 0; lane < kLanes; ++lane) {
          int row = lane_row(i / kChains, i % kChains, lane);
          int col = lane_column(i / kChains, i % kChains, lane);
          out[static_cast<int64_t>(row) * codes.n + t * MARLIN_TILE + col] = values[lane];
        }
      }
    }
  });
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
