#pragma once

#include <cstddef>

namespace qkern::cuda::emulator {

// A stack and a place in its code: what runs one CUDA thread. Switching costs a few nanoseconds, so
// a block of 1024 threads fits in one operating system thread. Each fiber is known to the address
// and thread sanitizers, where the build has one.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Makes the next switch_to() here run `entry` on this fiber's own, fresh stack. `entry` must not
  // return: it leaves by a last switch. What ran here before is forgotten.
  void start(void (*entry)());

  // Stops the running fiber `from`, which may be the caller's own stack, and continues `to`.
  // `last`: nobody comes back to `from`.
  static void switch_to(Fiber& from, Fiber& to, bool last = false);

  // The first thing `entry` calls.
  static void entered(Fiber& from);

  // Tells ThreadSanitizer that what ran in `other`, which nobody comes back to, is before what this
  // fiber, the running one, does from here on.
  void follow(const Fiber& other) const;

 private:
  void* context_ = nullptr;  // x86-64: the stack pointer; elsewhere a ucontext_t
  char* stack_ = nullptr;    // null: the operating system's stack
  const void* stack_bottom_ = nullptr;
  std::size_t stack_size_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_ = nullptr;        // ThreadSanitizer's handle
};

}  // namespace qkern::cuda::emulator
