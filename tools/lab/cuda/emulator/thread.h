#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "cuda_emulator/fiber.h"
#include "cuda_emulator/scheduler.h"

// What the scheduler knows of a thread and of a warp.
namespace qkern::cuda::emulator {

enum class State { kReady, kInBarrier, kInMeeting, kLeft };

// An array of registers and what wgmma_fence found in it.
struct FencedArray {
  const std::uint32_t* begin;
  std::vector<std::uint32_t> words;
};

struct Thread {
  Fiber fiber;
  State state = State::kLeft;
  uint3 index{};
  unsigned linear = 0;
  Site site{};        // where it waits
  unsigned mask = 0;  // whom it meets
  Meeting meeting{};  // and for what
  void* argument = nullptr;
  // What ThreadSanitizer is told of an ordered meeting: this lane's past is in `arrived`, and the
  // past of all lanes in `released`. Each lane has its own, for a lane that has gone on must not
  // seem to have done so before one that is still to wake up.
  char arrived = 0;
  char released = 0;
  std::deque<Copy> copies;         // issued, not arrived; oldest first
  std::deque<std::size_t> groups;  // sizes of the committed groups, oldest first
  std::size_t uncommitted = 0;     // copies after the last commit
  std::vector<FencedArray> fenced;
  unsigned proxy_fences = 0;  // calls of fence_async_proxy

  unsigned lane() const { return linear % kWarpSize; }
  unsigned warp() const { return linear / kWarpSize; }
};

struct Warp {
  unsigned ready = 0;  // lanes that can run
  unsigned left = 0;   // lanes that have returned
};

Thread& running_thread();

}  // namespace qkern::cuda::emulator
