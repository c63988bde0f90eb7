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

// Activation ids: positions in kernels.ACTIVATIONS.
#define MARLIN_ACTIVATION_SILU 0
#define MARLIN_ACTIVATION_GELU_TANH 1
#define MARLIN_ACTIVATION_SWIGLU_OAI 2

// An expert's format word is 2 * bits | codebook << 8.
#define MARLIN_FORMAT_HALF_BITS(format) ((format) & 0xffu)
#define MARLIN_FORMAT_CODEBOOK(format) ((format) >> 8)

#endif
