// One fault of each kind: what a sanitizer that does not see them would be worth. argv = heap|undefined|race
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

int main(int argc, char** argv) {
  const char* kind = argc > 1 ? argv[1] : "";
  if (std::strcmp(kind, "heap") == 0) {
    const std::vector<uint8_t> bytes(100 + argc);
    return bytes.data()[100 + argc] == 7;
  }
  if (std::strcmp(kind, "undefined") == 0) {
    return 1 << (30 + argc);
  }
  if (std::strcmp(kind, "race") == 0) {
    int number = 0;
    std::thread other([&number] { ++number; });
    ++number;
    other.join();
    return 0;
  }
  return 2;
}
