// What the drivers have in common.
#pragma once

#include <cstdio>
#include <cstdlib>

// A file, or the end of the program with the reason.
inline FILE* open_file(const char* path, const char* mode) {
  FILE* file = std::fopen(path, mode);
  if (!file) {
    std::perror(path);
    std::exit(1);
  }
  return file;
}
