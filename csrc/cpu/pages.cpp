#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace qkern::cpu {

#if defined(__linux__)

bool has_pages(const void* address, std::size_t bytes) {
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(address);
  // Not the first, where an allocator has written its own notes.
  constexpr int kSamples = 3;
  int there = 0;
  for (int i = 1; i <= kSamples; ++i) {
    const std::uintptr_t place = begin + bytes / (kSamples + 1) * static_cast<std::size_t>(i);
    unsigned char state = 1;
    void* const at = reinterpret_cast<void*>(place / page * page);
    if (mincore(at, page, &state) != 0) return true;
    there += state & 1;
  }
  return 2 * there > kSamples;
}

void ask_for_large_pages(void* address, std::size_t bytes) {
  constexpr std::uintptr_t kLarge = std::uintptr_t{2} << 20;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(address);
  const std::uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge;
  const std::uintptr_t last = (begin + bytes) / kLarge * kLarge;
  // It may be refused, and then all is as it was.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

#else

bool has_pages(const void*, std::size_t) { return true; }

void ask_for_large_pages(void*, std::size_t) {}

#endif

}  // namespace qkern::cpu
