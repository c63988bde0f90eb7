// What the host and the shaders must agree on: argument structs and function constants. Plain C.
#ifndef MLX_MARLIN_ARGS_H
#define MLX_MARLIN_ARGS_H

#define MARLIN_SIMD_SIZE 32  // lanes of a simdgroup, on every Apple GPU

// Most threads of a threadgroup, 16 simdgroups: what an M1 runs of a kernel with up to 96 registers.
#define MARLIN_MAX_THREADS 512

// Dtype ids of x and y: positions in kernels.DTYPES.
#define MARLIN_DTYPE_FLOAT32 0
#define MARLIN_DTYPE_FLOAT16 1
#define MARLIN_DTYPE_BFLOAT16 2

// Constants that decide which code there is at all. They are fixed in the text of a source: the host defines
// MARLIN_SOURCE_<name> for each, 0 if a dispatch does not name it. As function constants they would make Metal
// compile all 27 decoders before it drops 26 of them. `widths` has bit 2 * K set where an expert has K bits per weight,
// `codebooks` bit c where one has codebook c: gate and up share a decoder for every width and codebook that either
// has, which takes half the instructions of two loops.
#define MARLIN_SOURCE_CONSTANTS(X)                             \
  X(widths)                                                    \
  X(codebooks)                                                 \
  X(transposed)    /* rows times W^T: k and n change places */ \
  X(half_operands) /* x is halves, see tile_product.h */       \
  X(accelerator)   /* products run on neural accelerators */   \
  X(max_threads)   /* per threadgroup */

// Function constants: index, type, name. The first of a layer's projections of x is gate, or up where there is no gate.
#define MARLIN_FUNCTION_CONSTANTS(X)                                                 \
  X(0, uint, activation)                                                             \
  X(1, uint, dtype)                                                                  \
  X(2, bool, first_bias)                                                             \
  X(3, bool, second_bias)                                                            \
  X(4, bool, down_bias)                                                              \
  X(5, bool, routed)           /* positions are sorted by expert, see route.metal */ \
  X(6, bool, indexed)          /* a position's expert is in `indices` */             \
  X(7, bool, fused_prologue)   /* the product rotates x itself */                    \
  X(8, bool, activating_input) /* the product makes its input from sums before H */  \
  X(9, bool, local_input)      /* either: its input is in threadgroup memory */      \
  X(10, bool, rotated_input)   /* otherwise: it reads rotated activations */         \
  X(11, bool, fused_epilogue)  /* the product applies H and svh itself */            \
  X(12, bool, raw_output)      /* the product writes sums before H */                \
  X(13, bool, fragments)       /* rotated activations are in 8x8 fragments */        \
  X(14, bool, weighted)        /* scores are given */                                \
  X(15, bool, to_slots)        /* the product's rows go to scratch, not to y */      \
  X(16, bool, to_y)            /* the product's rows are rows of y */                \
  X(17, bool, gated)           /* two projections, gate and up, not one */           \
  X(18, bool, gated_prologue)  /* and the product rotates x for both */              \
  X(19, bool, gated_epilogue)  /* and what follows the sums is applied to both */

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
  unsigned int positions;
  unsigned int tiles;     // entries of the tile table
  unsigned int scanners;  // threads that count for one expert
};

struct MarlinRotateArgs {
  unsigned int k;        // padded input size
  unsigned int columns;  // row length of x
  unsigned int positions;
  unsigned int experts;
  unsigned int slots_per_row_inverse;  // of the slots that share one row of x: 2^31 / slots_per_row, rounded up
};

struct MarlinProductArgs {
  unsigned int k;            // padded input size
  unsigned int n;            // padded output size of one projection
  unsigned int in_columns;   // row length of x
  unsigned int out_columns;  // row length of y
  unsigned int positions;
  unsigned int experts;
  unsigned int slots_per_row;
  unsigned int column_tiles;      // 16-column tiles per threadgroup and projection
  unsigned int k_splits;          // simdgroups that share a column tile's sum
  unsigned int k_splits_inverse;  // of an item's number: 65536 / k_splits, rounded up
  unsigned int split_tiles;       // tiles of k in each split; the first long_splits have one more
  unsigned int long_splits;
  unsigned int zero;  // see shift_left in trellis.h
  float alpha;        // of activations with numbers
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

struct MarlinEmbeddingArgs {
  unsigned int rows;      // of the table
  unsigned int features;  // elements of a row
  unsigned int groups;    // of 256 elements, the last one may be incomplete
  unsigned int bits;      // per element
};

// One of the two passes of the encoder's search.
struct MarlinViterbiArgs {
  unsigned int forced;      // the state at both ends is given; otherwise ends are free
  unsigned int rotation;    // step t of the pass is position t ^ rotation of the tile
  unsigned int stride;      // steps between kept minima
  unsigned int slots;       // kept minima of a tile, the last one those before the last step
  unsigned int first_kept;  // steps before it keep none
  unsigned int tree_nodes;  // of the tree between two kept steps, beginning at 1
};

static_assert(sizeof(struct MarlinRowTile) == 12, "layout");
static_assert(sizeof(struct MarlinRouteArgs) == 28, "layout");
static_assert(sizeof(struct MarlinRotateArgs) == 20, "layout");
static_assert(sizeof(struct MarlinProductArgs) == 60, "layout");
static_assert(sizeof(struct MarlinActivateArgs) == 20, "layout");
static_assert(sizeof(struct MarlinCombineArgs) == 20, "layout");
static_assert(sizeof(struct MarlinDecodeArgs) == 16, "layout");
static_assert(sizeof(struct MarlinEmbeddingArgs) == 16, "layout");
static_assert(sizeof(struct MarlinViterbiArgs) == 24, "layout");

#endif
