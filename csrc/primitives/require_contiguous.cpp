#include "primitives/require_contiguous.h"

#include <stdexcept>

namespace mlx_marlin {

void require_contiguous(const std::string& op, const std::vector<mx::array>& inputs) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].flags().row_contiguous) {
      throw std::invalid_argument(
          "[" + op + "] input " + std::to_string(i) +
          " is not row contiguous; pass weights through mx.contiguous first.");
    }
  }
}

}  // namespace mlx_marlin
