#include "plan.h"

#include <algorithm>

namespace mlx_marlin {

std::string Dispatch::stem() const {
  const size_t first = std::string("trellis_").size();
  return kernel.substr(first, kernel.find('<') - first);
}

void Plan::add(Dispatch dispatch) {
  for (size_t i = 0; i < dispatches.size(); ++i) {
    const auto conflicts = [&dispatch](const Binding& earlier) {
      return std::any_of(dispatch.buffers.begin(), dispatch.buffers.end(), [&](const Binding& b) {
        const bool writes = b.access == Access::write || earlier.access == Access::write;
        const bool overlap = b.offset < earlier.offset + earlier.bytes && earlier.offset < b.offset + b.bytes;
        return writes && overlap && b.name == earlier.name;
      });
    };
    if (std::any_of(dispatches[i].buffers.begin(), dispatches[i].buffers.end(), conflicts)) {
      dispatch.after.push_back(static_cast<int>(i));
    }
  }
  dispatches.push_back(std::move(dispatch));
}

void Plan::reserve(const std::string& name, uint64_t bytes) {
  for (auto& [known, size] : scratch) {
    if (known == name) {
      size = std::max(size, bytes);
      return;
    }
  }
  scratch.emplace_back(name, bytes);
}

}  // namespace mlx_marlin
