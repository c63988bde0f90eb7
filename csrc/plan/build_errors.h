// What matters of a compiler's output.
#pragma once

#include <string>

namespace mlx_marlin {

// The lines with `error:` and the two after each, which show the place. The whole text where there is no such line.
std::string build_errors(const std::string& text);

}  // namespace mlx_marlin
