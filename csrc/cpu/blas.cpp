#include "cpu/blas.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/pool.h"

#if defined(__linux__)
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#endif

namespace mlx_marlin::cpu {

namespace {

constexpr int kRowMajor = 101, kNoTranspose = 111, kTranspose = 112;  // of cblas.h

// Floating-point operations of one task: some 100 us on a core, many times what waking a worker takes.
constexpr int64_t kTaskWork = 4'000'000;

constexpr int64_t kMostTasks = 64;  // as many as a large machine has cores

// Rows or columns of a task are a multiple of this, which every microkernel's block divides.
constexpr int64_t kTaskGrain = 48;

std::atomic<Sgemm> the_sgemm{nullptr};
std::atomic<Sgemv> the_sgemv{nullptr};

}  // namespace

// How a product is cut depends on its sizes alone: the same bits on any number of threads.
void parallel_sgemm(
    int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
    const float* b, int ldb, float beta, float* c, int ldc) {
  const Sgemm sgemm = the_sgemm.load(std::memory_order_acquire);
  const bool one_row = order == kRowMajor && m == 1;
  // One row reads a matrix for every two operations: that takes as long as eight from the cache.
  const int64_t work = (one_row ? 16 : 2) * int64_t(m) * n * k;
  const int64_t wanted = std::clamp<int64_t>(work / kTaskWork, 1, kMostTasks);
  const bool by_rows = m >= n;
  const int64_t size = by_rows ? m : n;
  if (!one_row && (order != kRowMajor || wanted < 2 || size < 2 * kTaskGrain)) {
    return sgemm(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
  const int64_t grains = (size + kTaskGrain - 1) / kTaskGrain;
  const int64_t share = (grains + wanted - 1) / wanted * kTaskGrain;
  const auto part = [&](int64_t task) {
    const int64_t first = task * share;
    const int count = static_cast<int>(std::min(share, size - first));
    const float* columns = b + first * (transpose_b == kNoTranspose ? 1 : ldb);
    if (one_row) {
      const bool across = transpose_b == kNoTranspose;  // b is [k, n]: its columns are added up
      the_sgemv.load(std::memory_order_relaxed)(
          order, across ? kTranspose : kNoTranspose, across ? k : count, across ? count : k, alpha, columns, ldb, a,
          transpose_a == kNoTranspose ? 1 : lda, beta, c + first, 1);
    } else if (by_rows) {
      const float* rows = a + first * (transpose_a == kNoTranspose ? lda : 1);
      sgemm(order, transpose_a, transpose_b, count, n, k, alpha, rows, lda, b, ldb, beta, c + first * ldc, ldc);
    } else {
      sgemm(order, transpose_a, transpose_b, m, count, k, alpha, a, lda, columns, ldb, beta, c + first, ldc);
    }
  };
  run_phases({{(size + share - 1) / share, part}}, threads());
}

#if defined(__linux__)

namespace {

// The dynamic section of a loaded object, as far as relocations of functions need it.
struct Relocations {
  const ElfW(Rela) * entries = nullptr;
  size_t bytes = 0;
  const ElfW(Sym) * symbols = nullptr;
  const char* names = nullptr;

  Relocations(const ElfW(Dyn) * dynamic, ElfW(Addr) base) {
    for (; dynamic && dynamic->d_tag != DT_NULL; ++dynamic) {
      // glibc makes addresses of the offsets in the file, musl leaves them.
      const ElfW(Addr) at = dynamic->d_un.d_ptr + (dynamic->d_un.d_ptr < base ? base : 0);
      switch (dynamic->d_tag) {
        case DT_JMPREL:
          entries = reinterpret_cast<const ElfW(Rela)*>(at);
          break;
        case DT_PLTRELSZ:
          bytes = dynamic->d_un.d_val;
          break;
        case DT_SYMTAB:
          symbols = reinterpret_cast<const ElfW(Sym)*>(at);
          break;
        case DT_STRTAB:
          names = reinterpret_cast<const char*>(at);
          break;
      }
    }
  }

  // Where a function that the object calls by name is taken from, as an offset; 0 where it calls none of that name.
  ElfW(Addr) slot(const char* function) const {
    for (size_t i = 0; symbols && names && i < bytes / sizeof(*entries); ++i) {
      if (!std::strcmp(names + symbols[ELF64_R_SYM(entries[i].r_info)].st_name, function)) {
        return entries[i].r_offset;
      }
    }
    return 0;
  }
};

// Writes to a slot that the linker may have made read-only once it had filled it (RELRO).
bool write_slot(ElfW(Addr) slot, const dl_phdr_info& object) {
  const ElfW(Addr) page = static_cast<ElfW(Addr)>(sysconf(_SC_PAGESIZE));
  void* begin = reinterpret_cast<void*>(slot / page * page);
  bool sealed = false;
  for (int i = 0; i < object.dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = object.dlpi_phdr[i];
    const ElfW(Addr) from = object.dlpi_addr + header.p_vaddr;
    // The loader seals whole pages: what lies behind the last of them stays writable, and data beside it.
    sealed |= header.p_type == PT_GNU_RELRO && slot >= from && slot < (from + header.p_memsz) / page * page;
  }
  if (sealed && mprotect(begin, page, PROT_READ | PROT_WRITE)) {
    return false;
  }
  __atomic_store_n(reinterpret_cast<void**>(slot), reinterpret_cast<void*>(&parallel_sgemm), __ATOMIC_RELEASE);
  return !sealed || !mprotect(begin, page, PROT_READ);
}

int replace_in(dl_phdr_info* object, size_t, void* done) {
  const char* file = std::strrchr(object->dlpi_name, '/');
  if (!file || std::strcmp(file, "/libmlx.so")) {
    return 0;
  }
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    if (object->dlpi_phdr[i].p_type == PT_DYNAMIC) {
      const Relocations relocations(
          reinterpret_cast<const ElfW(Dyn)*>(object->dlpi_addr + object->dlpi_phdr[i].p_vaddr), object->dlpi_addr);
      const ElfW(Addr) slot = relocations.slot("cblas_sgemm");
      *static_cast<bool*>(done) = slot && write_slot(object->dlpi_addr + slot, *object);
    }
  }
  return 1;
}

}  // namespace

bool replace_sgemm(Sgemm sgemm, Sgemv sgemv) {
  the_sgemv.store(sgemv, std::memory_order_relaxed);
  the_sgemm.store(sgemm, std::memory_order_release);
  bool done = false;
  dl_iterate_phdr(replace_in, &done);
  return done;
}

#else

bool replace_sgemm(Sgemm, Sgemv) {
  return false;
}

#endif

}  // namespace mlx_marlin::cpu
