#include "plan/plan.h"

#include <algorithm>
#include <cctype>

#include "args.h"

namespace mlx_marlin {

#define MARLIN_NAME(name) #name,
const std::vector<std::string> kSourceConstants = {MARLIN_SOURCE_CONSTANTS(MARLIN_NAME)};
#undef MARLIN_NAME

uint32_t Dispatch::constant(std::string_view name) const {
  const auto found =
      std::find_if(constants.begin(), constants.end(), [name](const Constant& c) { return c.name == name; });
  return found == constants.end() ? 0 : found->value;
}

std::string Dispatch::host_name() const {
  std::string name;
  for (const char c : kernel) {
    if (c != ' ') {
      name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
    }
  }
  return name;
}

std::string Dispatch::library(const std::string& file) const {
  std::string text;
  for (const std::string& name : kSourceConstants) {
    text += "#define MARLIN_SOURCE_" + name + " " + std::to_string(constant(name)) + "\n";
  }
  text += file;
  if (kernel.find('<') != std::string::npos) {
    text += "\ntemplate [[host_name(\"" + host_name() + "\")]] [[kernel]] decltype(" + kernel + ") " + kernel + ";\n";
  }
  return text;
}

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
