#pragma once

// What the sanitizers must be told about fibers. Empty without them. QKERN_EMULATOR_TSAN rather
// than the compiler's own macro: the emulator's sources are compiled without -fsanitize=thread, so
// that ThreadSanitizer sees what kernels do to memory and nothing of what the emulator does.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef QKERN_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_java_init(unsigned long heap_begin, unsigned long heap_size);
void __tsan_java_alloc(unsigned long begin, unsigned long size);
void __tsan_java_free(unsigned long begin, unsigned long size);
}
#endif

namespace qkern::cuda::emulator {

inline void tsan_acquire([[maybe_unused]] void* address) {
#ifdef QKERN_EMULATOR_TSAN
  __tsan_acquire(address);
#endif
}

inline void tsan_release([[maybe_unused]] void* address) {
#ifdef QKERN_EMULATOR_TSAN
  __tsan_release(address);
#endif
}

// While one lives, ThreadSanitizer ignores what intercepted functions (malloc, memset) touch, and
// memory they return starts with no history.
class TsanIgnores {
 public:
  TsanIgnores() { begin(); }
  ~TsanIgnores() { end(); }
  TsanIgnores(const TsanIgnores&) = delete;
  TsanIgnores& operator=(const TsanIgnores&) = delete;

  // For a fiber that is left for good, whose stack is never unwound: ThreadSanitizer ends the
  // program where a thread is gone while it is ignored.
  static void end_all();

 private:
  static void begin();
  static void end();
};

}  // namespace qkern::cuda::emulator
