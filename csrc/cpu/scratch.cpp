#include "scratch.h"

#include <atomic>
#include <cstdlib>

namespace qkern::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

std::atomic<std::size_t> peak{0};

struct Arena {
  void* data = nullptr;
  std::size_t size = 0;

  ~Arena() { std::free(data); }
};

}  // namespace

void* thread_scratch(std::size_t bytes) {
  thread_local Arena arena;
  if (bytes > kScratchLimit) return nullptr;
  std::size_t seen = peak.load(std::memory_order_relaxed);
  while (bytes > seen && !peak.compare_exchange_weak(seen, bytes, std::memory_order_relaxed)) {
  }
  if (arena.size < bytes) {
    const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    std::free(arena.data);
    arena.data = std::aligned_alloc(kAlignment, rounded);
    arena.size = arena.data != nullptr ? rounded : 0;
  }
  return arena.data;
}

std::size_t scratch_peak(bool reset) { return reset ? peak.exchange(0) : peak.load(); }

}  // namespace qkern::cpu
