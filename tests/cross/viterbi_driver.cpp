// Searches tiles from a file and writes their states to another. The test builds it for a foreign CPU:
// argv = instruction set, 2 * bits, values of the 65536 states, tiles, states. Float32 and uint16, bare.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/instruction_set.h"
#include "open_file.h"
#include "viterbi/search.h"

namespace {

std::vector<float> read_floats(const char* path) {
  FILE* file = open_file(path, "rb");
  std::fseek(file, 0, SEEK_END);
  std::vector<float> values(std::ftell(file) / sizeof(float));
  std::rewind(file);
  if (std::fread(values.data(), sizeof(float), values.size(), file) != values.size()) {
    std::fprintf(stderr, "%s ends early\n", path);
    std::exit(1);
  }
  std::fclose(file);
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: %s INSTRUCTION_SET HALF_BITS VALUES TILES STATES\n", argv[0]);
    return 1;
  }
  mlx_marlin::cpu::set_instruction_set(argv[1]);
  const std::vector<float> values = read_floats(argv[3]);
  const std::vector<float> tiles = read_floats(argv[4]);
  std::vector<uint16_t> states(tiles.size());
  mlx_marlin::viterbi::search(
      tiles.data(), int64_t(tiles.size()) / 256, values.data(), std::atoi(argv[2]), states.data(), 1);
  FILE* file = open_file(argv[5], "wb");
  std::fwrite(states.data(), sizeof(uint16_t), states.size(), file);
  std::fclose(file);
}
