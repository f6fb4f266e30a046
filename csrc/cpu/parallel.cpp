#include "parallel.h"

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace qkern::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInParallel = int (*)();

struct Runtime {
  GompParallel parallel = nullptr;
  OmpInParallel in_parallel = nullptr;
};

std::atomic<bool> in_forked_child{false};

#if defined(__unix__) || defined(__APPLE__)
// At load, not at the first kernel: the threads that a child lacks may be torch's alone.
[[maybe_unused]] const int atfork_registered =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
#endif

// Looked up rather than linked: a link would bring a second OpenMP runtime, with a second pool of
// threads spinning against torch's. GOMP_parallel is what compilers emit for `omp parallel`;
// LLVM's runtime exports it too.
Runtime find_runtime() {
  Runtime found;
#if defined(__unix__) || defined(__APPLE__)
  found.parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  found.in_parallel = reinterpret_cast<OmpInParallel>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
#endif
  return found;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

}  // namespace

void run_parallel(int num_threads, void (*body)(void*), void* context) {
  const Runtime& omp = runtime();
  const bool serial = num_threads <= 1 || omp.parallel == nullptr || in_forked_child.load() ||
                      (omp.in_parallel != nullptr && omp.in_parallel() != 0);
  if (serial) {
    body(context);
  } else {
    omp.parallel(body, context, static_cast<unsigned>(num_threads), 0);
  }
}

WorkQueue::WorkQueue(std::int64_t total, std::int64_t grain) : total_(total), grain_(grain) {}

bool WorkQueue::next(std::int64_t* begin, std::int64_t* end) {
  *begin = __atomic_fetch_add(&next_, grain_, __ATOMIC_RELAXED);
  if (*begin >= total_) return false;
  *end = *begin + grain_ < total_ ? *begin + grain_ : total_;
  return true;
}

const char* parallel_runtime() {
  return runtime().parallel != nullptr ? "OpenMP (shared)" : "none";
}

}  // namespace qkern::cpu
