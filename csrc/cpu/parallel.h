#pragma once

#include <cstdint>

// Included by the per-instruction-set files, so it holds no inline function that the linker could
// share between them: the copy that it keeps may use instructions that the processor lacks.
namespace qkern::cpu {

// Runs body(context) on up to num_threads threads of the OpenMP runtime that is already in the
// process (torch's own), and returns when all are done. Runs serially where there is none, inside
// another parallel region, and in a forked child, where the runtime's threads no longer exist; also
// where waiting for the other threads, as they came lately, would take longer than their part of
// the work does. `work` is about how many nanoseconds one thread takes for all of it.
void run_parallel(int num_threads, std::int64_t work, void (*body)(void*), void* context);

// Has run_parallel ask for the other threads every time, however late they come: for tests of what
// they do together.
void share_always(bool always);

// "libgomp", or "none" where run_parallel is serial.
const char* parallel_runtime();

template <typename Body>
void parallel(int num_threads, std::int64_t work, Body& body) {
  run_parallel(num_threads, work, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

// Runs body() on those threads, where it goes through `pieces` of work that each make one queue and
// call parallel(): all threads go through all of them in one order, each takes of a piece what the
// queue hands it, and begins the next without waiting for the others. So a body must do nothing
// else that others see.
void run_parallel_sequence(int num_threads, std::int64_t work, std::int64_t pieces,
                           void (*body)(void*), void* context);

template <typename Body>
void parallel_sequence(int num_threads, std::int64_t work, std::int64_t pieces, Body& body) {
  run_parallel_sequence(
      num_threads, work, pieces, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

// What threads count together, in a cache line of its own.
struct alignas(64) Counter {
  std::int64_t value = 0;
};

// Hands out [0, total) in runs of `grain`. Which thread gets which run is a matter of timing, so
// results must not depend on it. For runs that have little memory of their own; see PartedQueue.
class WorkQueue {
 public:
  WorkQueue(std::int64_t total, std::int64_t grain);
  WorkQueue(const WorkQueue&) = delete;
  WorkQueue& operator=(const WorkQueue&) = delete;

  bool next(std::int64_t* begin, std::int64_t* end);

 private:
  Counter own_;
  Counter& taken_;
  std::int64_t total_;
  std::int64_t grain_;
};

// Hands out [0, total) in runs of `grain`, as WorkQueue does, to threads that each read one part of
// it from the front: runs of one thread that lie apart would have memory begin anew at each. Who
// has done a part, helps with the others.
class PartedQueue {
 public:
  PartedQueue(std::int64_t total, std::int64_t grain, int num_threads);
  PartedQueue(const PartedQueue&) = delete;
  PartedQueue& operator=(const PartedQueue&) = delete;

  // A thread's own place in the queue.
  class Reader {
   public:
    explicit Reader(PartedQueue& queue);

    bool next(std::int64_t* begin, std::int64_t* end);

   private:
    PartedQueue& queue_;
    int first_;
    int done_ = 0;
  };

  static constexpr int kMaxParts = 64;  // more threads share them

 private:
  struct Part {
    std::int64_t begin, end;
  };

  std::int64_t grain_;
  int num_parts_;
  Part parts_[kMaxParts];
  Counter own_[1 + kMaxParts];
  Counter* counters_;  // of readers, then of what is taken of each part
};

}  // namespace qkern::cpu
