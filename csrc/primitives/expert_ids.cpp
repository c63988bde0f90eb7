#include "primitives/expert_ids.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "mlx/ops.h"

namespace mlx_marlin {

namespace {

[[noreturn]] void refuse(const std::string& op, const std::string& index, int64_t position, int experts) {
  throw std::invalid_argument(
      "[" + op + "] expert index " + index + " at position " + std::to_string(position) +
      " is out of range: the layer has " + std::to_string(experts) + " experts.");
}

// Where the row of the last axis with this number begins, in items.
int64_t row_offset(const mx::array& a, int64_t row) {
  int64_t offset = 0;
  for (int axis = static_cast<int>(a.ndim()) - 2; axis >= 0; --axis) {
    const auto [quotient, remainder] = std::lldiv(row, a.shape(axis));
    offset += remainder * a.strides(axis);
    row = quotient;
  }
  return offset;
}

template <class T>
void check(const std::string& op, const mx::array& indices, int experts) {
  const int columns = indices.shape(-1);
  const int64_t step = indices.strides(-1);
  const int64_t rows = static_cast<int64_t>(indices.size()) / columns;
  for (int64_t row = 0; row < rows; ++row) {
    const T* values = indices.data<T>() + row_offset(indices, row);
    for (int column = 0; column < columns; ++column) {
      const T value = values[column * step];
      const bool negative = std::is_signed_v<T> && value < T(0);
      if (negative || static_cast<uint64_t>(value) >= static_cast<uint64_t>(experts)) {
        refuse(op, std::to_string(value), row * columns + column, experts);
      }
    }
  }
}

void check(const std::string& op, const mx::array& indices, int experts) {
  switch (indices.dtype()) {
    case mx::int8:
      return check<int8_t>(op, indices, experts);
    case mx::uint8:
      return check<uint8_t>(op, indices, experts);
    case mx::int16:
      return check<int16_t>(op, indices, experts);
    case mx::uint16:
      return check<uint16_t>(op, indices, experts);
    case mx::int32:
      return check<int32_t>(op, indices, experts);
    case mx::uint32:
      return check<uint32_t>(op, indices, experts);
    case mx::int64:
      return check<int64_t>(op, indices, experts);
    case mx::uint64:
      return check<uint64_t>(op, indices, experts);
    default:
      throw std::invalid_argument("[" + op + "] indices must be integers.");
  }
}

void require_ids(const std::string& op, const uint32_t* ids, int64_t count, int experts) {
  const int64_t bad = cpu::find_bad_id(ids, count, experts);
  if (bad < 0) {
    return;
  }
  std::string index = std::to_string(ids[bad]);
  if (ids[bad] > static_cast<uint32_t>(std::numeric_limits<int32_t>::max())) {
    index = std::to_string(static_cast<int32_t>(ids[bad])) + " (unsigned: " + index + ")";
  }
  refuse(op, index, bad, experts);
}

}  // namespace

mx::array expert_ids(const std::string& op, const mx::array& indices, int experts, mx::StreamOrDevice s) {
  const bool tracer = indices.is_tracer();
  if (!tracer && indices.size() > 0 && indices.is_available()) {
    check(op, indices, experts);
  }
  mx::array ids = tracer ? mx::stop_gradient(indices, s) : indices;
  // Cast modulo 2^32, a wrong 64-bit index could become a legal one.
  if (ids.dtype() == mx::int64) {
    using Limits = std::numeric_limits<int32_t>;
    ids = mx::clip(ids, mx::array(Limits::min(), mx::int64), mx::array(Limits::max(), mx::int64), s);
  } else if (ids.dtype() == mx::uint64) {
    ids = mx::minimum(ids, mx::array(std::numeric_limits<uint32_t>::max(), mx::uint64), s);
  }
  return ids.dtype() == mx::uint32 ? ids : mx::astype(ids, mx::uint32, s);
}

void require_ids_or_nan(
    const std::string& op, const uint32_t* ids, int64_t count, int experts, cpu::DType dtype, void* out, int64_t size) {
  try {
    require_ids(op, ids, count, experts);
  } catch (...) {
    if (dtype == cpu::DType::float32) {
      std::fill_n(static_cast<float*>(out), size, std::numeric_limits<float>::quiet_NaN());
    } else {
      constexpr uint16_t kHalfNan = 0x7e00, kBfloatNan = 0x7fc0;
      std::fill_n(static_cast<uint16_t*>(out), size, dtype == cpu::DType::float16 ? kHalfNan : kBfloatNan);
    }
    throw;
  }
}

}  // namespace mlx_marlin
