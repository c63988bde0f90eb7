// Codes that the shim passes to the runtime. Plain C: both sides include it.
#pragma once

// msl_simd
enum {
  MSL_OP_BARRIER = 0,
  MSL_OP_SHUFFLE = 1,
  MSL_OP_SHUFFLE_XOR = 2,
  MSL_OP_SHUFFLE_UP = 3,
  MSL_OP_SHUFFLE_DOWN = 4,
  MSL_OP_ROTATE_UP = 5,
  MSL_OP_ROTATE_DOWN = 6,
  MSL_OP_BROADCAST = 7,
  MSL_OP_BROADCAST_FIRST = 8,
  MSL_OP_SUM = 10,
  MSL_OP_PRODUCT = 11,
  MSL_OP_MAX = 12,
  MSL_OP_MIN = 13,
  MSL_OP_AND = 14,
  MSL_OP_OR = 15,
  MSL_OP_XOR = 16,
  MSL_OP_PREFIX_INCLUSIVE_SUM = 17,
  MSL_OP_PREFIX_EXCLUSIVE_SUM = 18,
  MSL_OP_PREFIX_INCLUSIVE_PRODUCT = 19,
  MSL_OP_PREFIX_EXCLUSIVE_PRODUCT = 20,
  MSL_OP_BALLOT = 25,
  MSL_OP_IS_FIRST = 26,
  MSL_OP_MATRIX_LANE = 27,
  MSL_OP_MATRIX_MULTIPLY = 28,
  MSL_OP_FILL_UP = 30,
  MSL_OP_FILL_DOWN = 31,
  MSL_OP_QUAD = 40,  // added to any of the above: the operation is on four lanes
};

// msl_atomic
enum {
  MSL_ATOMIC_LOAD = 0,
  MSL_ATOMIC_EXCHANGE = 1,
  MSL_ATOMIC_ADD = 2,
  MSL_ATOMIC_SUB = 3,
  MSL_ATOMIC_MIN = 4,
  MSL_ATOMIC_MAX = 5,
  MSL_ATOMIC_AND = 6,
  MSL_ATOMIC_OR = 7,
  MSL_ATOMIC_XOR = 8,
  MSL_ATOMIC_COMPARE_EXCHANGE = 9,
};

// Element types of both
enum {
  MSL_FLOAT = 0,
  MSL_HALF = 1,
  MSL_BFLOAT = 2,
  MSL_CHAR = 3,
  MSL_UCHAR = 4,
  MSL_SHORT = 5,
  MSL_USHORT = 6,
  MSL_INT = 7,
  MSL_UINT = 8,
  MSL_LONG = 9,
  MSL_ULONG = 10,
};
