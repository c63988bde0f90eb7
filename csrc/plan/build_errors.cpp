#include "plan/build_errors.h"

#include <sstream>

namespace mlx_marlin {

std::string build_errors(const std::string& text) {
  std::istringstream lines(text);
  std::string kept;
  int wanted = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.find("error:") != std::string::npos) {
      wanted = 3;
    }
    if (wanted > 0) {
      kept += (kept.empty() ? "" : "\n") + line;
      --wanted;
    }
  }
  return kept.empty() ? text : kept;
}

}  // namespace mlx_marlin
