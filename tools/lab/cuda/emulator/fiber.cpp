#include "cuda_emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cuda_emulator/sanitizers.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef QKERN_EMULATOR_TSAN
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace qkern::cuda::emulator {
namespace {

// Kernels keep arrays in registers on a device; here they are on the stack, several times larger in
// an unoptimised or sanitized build. Pages are taken when first touched.
constexpr std::size_t kStackSize = 256 << 10;
constexpr std::size_t kGuardSize = 4 << 10;
constexpr std::size_t kMaxStacks = 1024;  // a block's threads

// All stacks lie in one piece, each above an inaccessible page. They are never given back.
char* allocate_stack() {
  static char* arena = nullptr;
  static std::size_t used = 0;
  constexpr std::size_t kPitch = kGuardSize + kStackSize;
  if (arena == nullptr) {
    void* memory = mmap(nullptr, kMaxStacks * kPitch, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    arena = static_cast<char*>(memory);
#ifdef QKERN_EMULATOR_TSAN
    __tsan_java_init(reinterpret_cast<unsigned long>(arena), kMaxStacks * kPitch);
#endif
  }
  if (used == kMaxStacks) throw std::bad_alloc();
  char* guard = arena + kPitch * used++;
  if (mprotect(guard, kGuardSize, PROT_NONE) != 0) throw std::bad_alloc();
  return guard + kGuardSize;
}

#ifdef QKERN_EMULATOR_TSAN
// A stack's next user is ordered by nothing after its last, and what both do to it is no race.
// ThreadSanitizer offers to forget an address range only to virtual machines, for their heaps.
void forget_accesses(char* stack) {
  constexpr std::size_t kMostUsed = 32 << 10;
  const auto begin = reinterpret_cast<unsigned long>(stack + kStackSize - kMostUsed);
  __tsan_java_free(begin, kMostUsed);
  __tsan_java_alloc(begin, kMostUsed);
}
#endif

}  // namespace
}  // namespace qkern::cuda::emulator

#ifdef __x86_64__

// qkern_emulator_switch(void** save, void* load): what the System V ABI makes a callee preserve
// goes to the old stack, whose pointer goes to *save; the same comes back from the stack `load`.
asm(R"(
    .text
    .type qkern_emulator_switch, @function
qkern_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size qkern_emulator_switch, . - qkern_emulator_switch
)");
extern "C" void qkern_emulator_switch(void** save, void* load);

namespace qkern::cuda::emulator {
namespace {

void* make_context(void*, char* stack, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto** top = reinterpret_cast<void**>(stack + kStackSize);
  *--top = nullptr;  // where `entry` would return to; leaves the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  return top;
}

void switch_context(void*& from, void*& to) { qkern_emulator_switch(&from, to); }

void free_context(void*) {}

}  // namespace
}  // namespace qkern::cuda::emulator

#else

namespace qkern::cuda::emulator {
namespace {

void* make_context(void* previous, char* stack, void (*entry)()) {
  auto* context = static_cast<ucontext_t*>(previous);
  if (context == nullptr) context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackSize;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void switch_context(void*& from, void*& to) {
  if (from == nullptr) from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from), static_cast<ucontext_t*>(to));
}

void free_context(void* context) { delete static_cast<ucontext_t*>(context); }

}  // namespace
}  // namespace qkern::cuda::emulator

#endif

namespace qkern::cuda::emulator {
namespace {

// How many `TsanIgnores` live. One count does for all fibers, for none is left for a while in one.
thread_local int ignores_held = 0;

}  // namespace

void TsanIgnores::begin() {
  ++ignores_held;
#ifdef QKERN_EMULATOR_TSAN
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}

void TsanIgnores::end() {
  --ignores_held;
#ifdef QKERN_EMULATOR_TSAN
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

void TsanIgnores::end_all() {
  while (ignores_held > 0) end();
}

Fiber::~Fiber() {
#ifdef QKERN_EMULATOR_TSAN
  if (stack_ != nullptr && tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
#endif
  free_context(context_);
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) {
    stack_ = allocate_stack();
    stack_bottom_ = stack_;
    stack_size_ = kStackSize;
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_, kStackSize);
  fake_stack_ = nullptr;
#endif
#ifdef QKERN_EMULATOR_TSAN
  // A new one for every block: threads of different blocks are ordered by nothing.
  if (tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
  tsan_ = __tsan_create_fiber(0);
  forget_accesses(stack_);
#endif
  context_ = make_context(context_, stack_, entry);
}

void Fiber::switch_to(Fiber& from, Fiber& to, bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, to.stack_bottom_,
                                 to.stack_size_);
#endif
  if (last) TsanIgnores::end_all();
#ifdef QKERN_EMULATOR_TSAN
  constexpr unsigned kNoSynchronisation = 1;
  if (from.stack_ == nullptr) from.tsan_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan_, kNoSynchronisation);
#endif
  switch_context(from.context_, to.context_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered([[maybe_unused]] Fiber& from) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (from.stack_ == nullptr) {
    from.stack_bottom_ = bottom;
    from.stack_size_ = size;
  }
#endif
}

void Fiber::follow([[maybe_unused]] const Fiber& other) const {
#ifdef QKERN_EMULATOR_TSAN
  constexpr unsigned kNoSynchronisation = 1;
  __tsan_switch_to_fiber(other.tsan_, kNoSynchronisation);
  __tsan_switch_to_fiber(tsan_, 0);
#endif
}

}  // namespace qkern::cuda::emulator
