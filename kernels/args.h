// What the host and the shaders must agree on: argument structs and function constants. Plain C.
#ifndef MLX_MARLIN_ARGS_H
#define MLX_MARLIN_ARGS_H

#define MARLIN_SIMD_SIZE 32  // lanes of a simdgroup, on every Apple GPU

// Threads of the largest threadgroup, 16 simdgroups. Kernels declare it, so that the compiler keeps their registers
// low enough for an M1 to run it.
#define MARLIN_MAX_THREADS 512

// Dtype ids of x and y: positions in kernels.DTYPES.
#define MARLIN_DTYPE_FLOAT32 0
#define MARLIN_DTYPE_FLOAT16 1
#define MARLIN_DTYPE_BFLOAT16 2

// Function constants: index, type, name. `*_widths` has bit K set where an expert has K bits per weight,
// `*_codebooks` bit c where one has codebook c: other decoders are not compiled. `down_*` also stands for
// the only weight of a linear.
#define MARLIN_FUNCTION_CONSTANTS(X)                                                \
  X(0, uint, gate_widths)                                                           \
  X(1, uint, gate_codebooks)                                                        \
  X(2, uint, up_widths)                                                             \
  X(3, uint, up_codebooks)                                                          \
  X(4, uint, down_widths)                                                           \
  X(5, uint, down_codebooks)                                                        \
  X(6, uint, activation)                                                            \
  X(7, uint, dtype)                                                                 \
  X(8, bool, gate_bias)                                                             \
  X(9, bool, up_bias)                                                               \
  X(10, bool, down_bias)                                                            \
  X(11, bool, routed)         /* positions are sorted by expert, see route.metal */ \
  X(12, bool, indexed)        /* a position's expert is in `indices` */             \
  X(13, bool, fused_prologue) /* the product rotates x itself */                    \
  X(14, bool, rotated_input)  /* the product reads rotated activations */           \
  X(15, bool, fused_epilogue) /* the product applies H and svh itself */            \
  X(16, bool, raw_output)     /* the product writes sums before H */                \
  X(17, bool, fragments)      /* rotated activations are in 8x8 fragments */        \
  X(18, bool, weighted)       /* scores are given */                                \
  X(19, bool, to_slots)       /* the product's rows go to scratch, not to y */      \
  X(20, bool, to_y)           /* the product's rows are rows of y */                \
  X(21, bool, paired)         /* gate and up, not one weight */                     \
  X(22, bool, transposed)     /* rows times W^T: k and n change places */

// A run of positions of one expert, at most as many as a tile has rows. expert == experts: the indices
// were out of range. count == 0: unused.
struct MarlinRowTile {
  unsigned int expert;
  unsigned int first;
  unsigned int count;
};

struct MarlinRouteArgs {
  unsigned int slots;
  unsigned int experts;
  unsigned int tile_rows;  // rows of a MarlinRowTile at most
  unsigned int alignment;  // an expert's first position is a multiple of it
  unsigned int tiles;      // entries of the tile table
  unsigned int scanners;   // threads that count for one expert
};

struct MarlinRotateArgs {
  unsigned int k;        // padded input size
  unsigned int columns;  // row length of x
  unsigned int positions;
  unsigned int experts;
  unsigned int slots_per_row;  // slots that share one row of x
};

struct MarlinProductArgs {
  unsigned int k;            // padded input size
  unsigned int n;            // padded output size of one projection
  unsigned int in_columns;   // row length of x
  unsigned int out_columns;  // row length of y
  unsigned int positions;
  unsigned int experts;
  unsigned int slots_per_row;
  unsigned int column_tiles;  // 16-column tiles per threadgroup and projection
  unsigned int k_splits;      // simdgroups that share a column tile's sum
  unsigned int zero;          // see shift_left in trellis.h
  float alpha;                // swiglu_oai
  float limit;
};

struct MarlinActivateArgs {
  unsigned int n;
  unsigned int positions;
  unsigned int experts;
  float alpha;
  float limit;
};

struct MarlinCombineArgs {
  unsigned int n;              // padded
  unsigned int out_columns;    // row length of y
  unsigned int rows;           // of y
  unsigned int slots_per_row;  // summed in slot order
  unsigned int experts;
};

struct MarlinDecodeArgs {
  unsigned int n;
  unsigned int tiles;
  unsigned int expert;
  unsigned int zero;
};

static_assert(sizeof(struct MarlinRowTile) == 12, "layout");
static_assert(sizeof(struct MarlinRouteArgs) == 24, "layout");
static_assert(sizeof(struct MarlinRotateArgs) == 20, "layout");
static_assert(sizeof(struct MarlinProductArgs) == 48, "layout");
static_assert(sizeof(struct MarlinActivateArgs) == 20, "layout");
static_assert(sizeof(struct MarlinCombineArgs) == 20, "layout");
static_assert(sizeof(struct MarlinDecodeArgs) == 16, "layout");

#endif
