#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <vector>

#include "subnormals.h"

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

using Clock = std::chrono::steady_clock;

std::int64_t nanoseconds(Clock::duration time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

// How long a caller has lately waited for the other threads before and after its own work. On a
// quiet machine that is a microsecond, or less than a hundred, where they slept. With other
// processes on the cores it is milliseconds: a thread that was put aside holds back everybody until
// it is its turn again, whether or not it has work left. Short calls are quicker alone then.
class LateThreads {
 public:
  // Whether the caller alone is done before the others would be waited for.
  bool outlast(std::int64_t nanoseconds, int num_threads) {
    if (always_.load(std::memory_order_relaxed)) return false;
    // Not even threads that spin come at once.
    constexpr std::int64_t kLeast = 2'000;
    if (nanoseconds < kLeast) return true;
    // On a crowded machine the caller, too, has but a part of a core, so that what the others would
    // take off it is worth more than on a quiet one.
    constexpr std::int64_t kCrowding = 4;
    const std::int64_t wait = wait_.load(std::memory_order_relaxed);
    if (nanoseconds - nanoseconds / num_threads >= wait / kCrowding) return false;
    // What is not measured any more is believed less and less, until the others are tried again.
    constexpr std::int64_t kForget = 32;
    wait_.store(wait - nanoseconds / kForget - 1, std::memory_order_relaxed);
    return true;
  }

  // After a call shared: how long the caller worked and waited. A short wait beside the work may
  // be for the rest of another thread's part.
  void note(std::int64_t worked, std::int64_t waited) {
    constexpr std::int64_t kShareOfWork = 4, kLongest = 8'000'000, kWeight = 4;
    const std::int64_t late = std::clamp<std::int64_t>(waited - worked / kShareOfWork, 0, kLongest);
    const std::int64_t wait = wait_.load(std::memory_order_relaxed);
    wait_.store(wait + (late - wait) / kWeight, std::memory_order_relaxed);
  }

  void share_always(bool always) { always_.store(always); }

 private:
  std::atomic<bool> always_{false};
  // Callers in several threads may overwrite each other's, for an estimate that is good enough.
  std::atomic<std::int64_t> wait_{0};
};

LateThreads late_threads;

struct Region {
  void (*body)(void*);
  void* context;
  const void* caller;
  // When the caller had its threads, which may be late from the region before, and when it found
  // nothing left to do.
  Clock::time_point begun, done;
};

const void* this_thread() {
  static thread_local const char place = 0;
  return &place;
}

void run_region(void* data) {
  [[maybe_unused]] const KeepSubnormals keep;
  Region& region = *static_cast<Region*>(data);
  const bool timed = region.caller == this_thread();
  if (timed) region.begun = Clock::now();
  region.body(region.context);
  if (timed) region.done = Clock::now();
}

// Pieces of work that threads go through side by side. A thread's own copy of a piece's queue
// counts on what all threads share.
struct Sequence {
  std::int64_t pieces;
  int parts;  // that a queue may have
  std::vector<Counter> counters;

  Sequence(std::int64_t pieces, int num_threads)
      : pieces(pieces),
        parts(std::clamp(num_threads, 1, PartedQueue::kMaxParts)),
        counters(static_cast<std::size_t>(pieces * (1 + parts))) {}

  Counter* at(std::int64_t piece) {
    // Not shared, a queue would have every thread do everything.
    if (piece >= pieces) std::abort();
    return counters.data() + piece * (1 + parts);
  }
};

// Where the calling thread is in one.
struct Place {
  Sequence* sequence;
  std::int64_t piece;
};
thread_local Place place{nullptr, 0};

// The shared counters of the queue that is being made, or null where it is used by parallel()
// alone.
Counter* next_shared() {
  return place.sequence == nullptr ? nullptr : place.sequence->at(place.piece++);
}

int most_parts(int num_threads) {
  const int most = place.sequence == nullptr ? PartedQueue::kMaxParts : place.sequence->parts;
  return std::clamp(num_threads, 1, most);
}

struct SequenceBody {
  Sequence* sequence;
  void (*body)(void*);
  void* context;

  void operator()() const {
    place = {sequence, 0};
    body(context);
    place = {nullptr, 0};
  }
};

}  // namespace

void run_parallel_sequence(int num_threads, std::int64_t work, std::int64_t pieces,
                           void (*body)(void*), void* context) {
  Sequence sequence(pieces, num_threads);
  SequenceBody on_each{&sequence, body, context};
  parallel(num_threads, work, on_each);
}

void run_parallel(int num_threads, std::int64_t work, void (*body)(void*), void* context) {
  const Runtime& omp = runtime();
  const bool serial = num_threads <= 1 || place.sequence != nullptr || omp.parallel == nullptr ||
                      in_forked_child.load() ||
                      (omp.in_parallel != nullptr && omp.in_parallel() != 0);
  if (serial || late_threads.outlast(work, num_threads)) {
    Region region{body, context, nullptr, {}, {}};
    run_region(&region);
    return;
  }
  Region region{body, context, this_thread(), {}, {}};
  const Clock::time_point begin = Clock::now();
  omp.parallel(run_region, &region, static_cast<unsigned>(num_threads), 0);
  const std::int64_t worked = nanoseconds(region.done - region.begun);
  late_threads.note(worked, nanoseconds(Clock::now() - begin) - worked);
}

WorkQueue::WorkQueue(std::int64_t total, std::int64_t grain)
    : taken_(place.sequence == nullptr ? own_ : *next_shared()), total_(total), grain_(grain) {}

bool WorkQueue::next(std::int64_t* begin, std::int64_t* end) {
  *begin = __atomic_fetch_add(&taken_.value, grain_, __ATOMIC_RELAXED);
  if (*begin >= total_) return false;
  *end = *begin + grain_ < total_ ? *begin + grain_ : total_;
  return true;
}

PartedQueue::PartedQueue(std::int64_t total, std::int64_t grain, int num_threads)
    : grain_(grain), num_parts_(most_parts(num_threads)), counters_(next_shared()) {
  if (counters_ == nullptr) counters_ = own_;
  const std::int64_t runs = (total + grain - 1) / grain;
  for (std::int64_t p = 0; p < num_parts_; ++p) {
    const std::int64_t begin = p * runs / num_parts_, end = (p + 1) * runs / num_parts_;
    parts_[p] = {begin * grain, std::min(end * grain, total)};
  }
}

PartedQueue::Reader::Reader(PartedQueue& queue)
    : queue_(queue),
      first_(static_cast<int>(__atomic_fetch_add(&queue.counters_->value, 1, __ATOMIC_RELAXED) %
                              queue.num_parts_)) {}

bool PartedQueue::Reader::next(std::int64_t* begin, std::int64_t* end) {
  for (; done_ < queue_.num_parts_; ++done_) {
    const int number = (first_ + done_) % queue_.num_parts_;
    const Part& part = queue_.parts_[number];
    std::int64_t* const taken = &queue_.counters_[1 + number].value;
    // Most parts are done by then, and a look at one disturbs nobody.
    if (__atomic_load_n(taken, __ATOMIC_RELAXED) >= part.end - part.begin) continue;
    *begin = part.begin + __atomic_fetch_add(taken, queue_.grain_, __ATOMIC_RELAXED);
    if (*begin >= part.end) continue;
    *end = std::min(*begin + queue_.grain_, part.end);
    return true;
  }
  return false;
}

void share_always(bool always) { late_threads.share_always(always); }

const char* parallel_runtime() {
  return runtime().parallel != nullptr ? "OpenMP (shared)" : "none";
}

}  // namespace qkern::cpu
