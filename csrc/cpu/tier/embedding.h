// One group of a quantized token embedding. Included by table.cpp only.
#pragma once

namespace mlx_marlin::cpu::MARLIN_TIER {

// The 16-bit states of a ring in element order. Its words hold a stream, least significant bit first: `bits` bits for
// each element, which are the lowest of its state, those of earlier elements above them, around the ring.
static void embedding_states(const uint16_t* words, int bits, uint32_t* states) {
  const auto fresh = [words, bits](int i) {
    const int offset = (i & (MARLIN_TILE_SIZE - 1)) * bits;
    const int word = offset / 16, shift = offset % 16;
    const uint32_t above = shift + bits > 16 ? words[word + 1] : 0u;
    return ((words[word] | above << 16) >> shift) & ((1u << bits) - 1);
  };
  uint32_t state = 0;
  for (int i = -((15 + bits) / bits); i < MARLIN_TILE_SIZE; ++i) {
    state = (state << bits | fresh(i)) & 0xffff;
    if (i >= 0) {
      states[i] = state;
    }
  }
}

// out = half(H256(mul1(states) * scale) / 16 * signs): MARLIN_TILE_SIZE halves. ring: the scale, then 16 * bits words.
static void embed_group(const uint16_t* ring, int bits, const uint16_t* signs, uint16_t* out) {
  alignas(64) uint32_t states[MARLIN_TILE_SIZE];
  alignas(64) float v[MARLIN_TILE_SIZE];
  embedding_states(ring + 1, bits, states);
  alignas(64) uint16_t lanes[kLanes] = {ring[0]};
  alignas(64) float scale[kLanes];
  store(scale, load_half(lanes));
  for (int i = 0; i < MARLIN_TILE_SIZE; ++i) {
    const uint32_t x = states[i] * MARLIN_MUL1_MULTIPLIER;
    const uint32_t sum = (x & 0xff) + (x >> 8 & 0xff) + (x >> 16 & 0xff) + (x >> 24);
    v[i] = static_cast<float>(1024 + sum) * MARLIN_MUL1_SCALE + MARLIN_MUL1_OFFSET;  // exact: at most 22 bits
  }
  for (int i = 0; i < MARLIN_TILE_SIZE; i += kLanes) {
    alignas(64) uint16_t rounded[kLanes];
    store_half(rounded, load(v + i));
    store(v + i, load_half(rounded) * set1(scale[0]));
  }
  for (int width = 1; width < MARLIN_TILE_SIZE; width *= 2) {
    for (int block = 0; block < MARLIN_TILE_SIZE; block += 2 * width) {
      for (int i = block; i < block + width; ++i) {
        const float a = v[i], b = v[i + width];
        v[i] = a + b;
        v[i + width] = a - b;
      }
    }
  }
  for (int i = 0; i < MARLIN_TILE_SIZE; i += kLanes) {
    store_half(out + i, load(v + i) * set1(0.0625f) * load_half(signs + i));
  }
}

// Halves as another dtype.
static void store_halves(DType dtype, const uint16_t* halves, int count, void* out) {
  if (dtype == DType::float16) {
    std::memcpy(out, halves, static_cast<size_t>(count) * sizeof(uint16_t));
    return;
  }
  alignas(64) float v[MARLIN_TILE_SIZE];
  for (int i = 0; i < MARLIN_TILE_SIZE; i += kLanes) {
    store(v + i, load_half(halves + i));
  }
  store(dtype, v, count, out);
}

static void embed(DType dtype, const uint16_t* ring, int bits, const uint16_t* signs, int count, void* out) {
  alignas(64) uint16_t halves[MARLIN_TILE_SIZE];
  embed_group(ring, bits, signs, halves);
  store_halves(dtype, halves, count, out);
}

}  // namespace mlx_marlin::cpu::MARLIN_TIER
