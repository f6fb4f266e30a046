#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace qkern::cpu {
namespace {

// Subnormal numbers keep their values on this thread while this lives, whatever
// torch.set_flush_denormal said: it acts on the calling thread alone, so that results would depend
// on the thread.
class KeepSubnormals {
 public:
#if defined(__SSE2__)
  KeepSubnormals() : saved_(_mm_getcsr()) {
    constexpr unsigned kFlushToZero = 1u << 15, kSubnormalsAreZero = 1u << 6;
    _mm_setcsr(saved_ & ~(kFlushToZero | kSubnormalsAreZero));
  }
  ~KeepSubnormals() { _mm_setcsr(saved_); }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  KeepSubnormals() {
    // FPCR.FZ and FPCR.FIZ; the latter is for processors with FEAT_AFP, and zero on others.
    constexpr std::uint64_t kFlushToZero = 1u << 24, kFlushInputsToZero = 1u << 0;
    asm volatile("mrs %0, fpcr" : "=r"(saved_)::"memory");
    set(saved_ & ~(kFlushToZero | kFlushInputsToZero));
  }
  ~KeepSubnormals() { set(saved_); }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
  static void set(std::uint64_t value) { asm volatile("msr fpcr, %0" ::"r"(value) : "memory"); }

  std::uint64_t saved_;
#endif
};

}  // namespace
}  // namespace qkern::cpu
