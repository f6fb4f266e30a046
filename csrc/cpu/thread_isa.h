// An instruction set that a thread takes for a while. Alone in a file, because what reads Python's
// arguments is also built without the CPU's kernels.
#pragma once

namespace qkern::cpu {

// Its name, or nullptr.
inline thread_local const char* isa_of_thread = nullptr;

// The instruction set that the calling thread takes whatever else is in force, while this lives.
// `name` may be nullptr, which changes nothing; an unknown one is as one in QKERN_CPU_ISA.
class ThreadIsa {
 public:
  explicit ThreadIsa(const char* name) : before_(isa_of_thread) {
    if (name != nullptr) isa_of_thread = name;
  }
  ~ThreadIsa() { isa_of_thread = before_; }
  ThreadIsa(const ThreadIsa&) = delete;
  ThreadIsa& operator=(const ThreadIsa&) = delete;

 private:
  const char* before_;
};

}  // namespace qkern::cpu
