// Constants of the EXL3 format. Included by host code and by every shader: plain C, no headers.
#ifndef MLX_MARLIN_FORMAT_H
#define MLX_MARLIN_FORMAT_H

#define MARLIN_TILE 16                        // a tile is 16 x 16 weights
#define MARLIN_TILE_SIZE 256                  // weights per tile
#define MARLIN_HADAMARD_SIZE 128              // block length of the Hadamard transforms
#define MARLIN_MAX_BITS 8                     // bits per weight: 1 .. 8
#define MARLIN_TILE_WORDS(bits) (8 * (bits))  // uint32 words of one tile

// Codebook ids: positions in codec.CODEBOOKS.
#define MARLIN_CODEBOOK_3INST 0
#define MARLIN_CODEBOOK_MCG 1
#define MARLIN_CODEBOOK_MUL1 2

// What a codebook makes of a 16-bit state (ExLlamaV3 1.4.1, exllamav3_ext/quant/codebook.cuh), x = multiplier * state
// modulo 2^32. 3INST and MCG add the two halves (binary16) of ((x + increment) & mask) ^ xor; MCG's increment is 0.
#define MARLIN_3INST_MULTIPLIER 89226354u
#define MARLIN_3INST_INCREMENT 64248484u
#define MARLIN_MCG_MULTIPLIER 0xCBAC1FEDu
#define MARLIN_HALVES_MASK 0x8FFF8FFFu
#define MARLIN_HALVES_XOR 0x3B603B60u
// MUL1: (1024 + the sum of the four bytes of x) * scale + offset, rounded once to a half.
#define MARLIN_MUL1_MULTIPLIER 0x83DCD12Du
#define MARLIN_MUL1_SCALE 0x1.bb8p-8f      // half 0x1EEE
#define MARLIN_MUL1_OFFSET (-0x1.4c4p+3f)  // half 0xC931

// Activation ids: positions in kernels.ACTIVATIONS.
#define MARLIN_ACTIVATION_SILU 0
#define MARLIN_ACTIVATION_GELU_TANH 1
#define MARLIN_ACTIVATION_SWIGLU_OAI 2
#define MARLIN_ACTIVATION_RELU_SQUARED 3
#define MARLIN_ACTIVATION_SWIGLU_CLAMPED 4
#define MARLIN_ACTIVATION_SWIGLU_STEP 5
#define MARLIN_ACTIVATION_SITU 6

// An expert's format word is 2 * bits | codebook << 8.
#define MARLIN_FORMAT_HALF_BITS(format) ((format) & 0xffu)
#define MARLIN_FORMAT_CODEBOOK(format) ((format) >> 8)

#endif
