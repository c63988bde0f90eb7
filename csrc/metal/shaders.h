// Where the shader sources come from: Python reads the installed files once, C++ reads none.
#pragma once

#include <string>
#include <unordered_map>

namespace mlx_marlin::metal {

// Self-contained source by kernel family. Set before the first call that runs on a GPU.
void set_shaders(std::unordered_map<std::string, std::string> sources);

}  // namespace mlx_marlin::metal
