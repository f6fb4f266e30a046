#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_emulator/types.h"

// Runs the threads of a launch, one block after another, each thread as a fiber that runs until it
// must wait for others. Which of those that can run goes next is the schedule, a setting: a kernel
// that lacks a barrier gives different results under some of them.
//
// A mistake that a device would answer with garbage or a hang ends the launch with a message.
namespace qkern::cuda::emulator {

// kForward: the first warp, and in it the first lane, that can run; so the first warp runs as far
// ahead as barriers let it. kReverse: the last ones. kRandom: any, from a seed. Blocks are run in
// the same order.
enum class Order { kForward, kReverse, kRandom };

// When the bytes of a cp.async arrive: at once, or not before the wait that asks for them. Late,
// the destination holds poison in between, as nothing is known about it on a device. The same of
// products of warpgroups (wgmma.h): late, they read their operands no earlier than the wait.
enum class CpAsync { kEarly, kLate };

struct Settings {
  Order order = Order::kForward;
  std::uint64_t seed = 0;
  CpAsync cp_async = CpAsync::kLate;
  int capability = 80;  // of the device pretended to be: 10 * major + minor
};

Settings& settings();

// What was launched: the device that was the current one and the stream, of the latest.
struct Launches {
  int current_device = 0;
  bool computed = true;  // false: launches are noted and do nothing
  std::int64_t count = 0;
  int device = 0;
  void* stream = nullptr;
};

Launches& launches();
inline int capability() { return settings().capability; }

// What uninitialised shared memory is filled with: a NaN in every floating type.
inline constexpr int kPoisonByte = 0xff;
inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

// Where a thread called an operation: how two barriers are told apart, and what messages name.
struct Site {
  const char* operation;
  const char* file;
  int line;
};

// Runs body(context) in every thread of the grid. Null, or what went wrong, valid until the next
// launch. One launch at a time: others wait.
const char* run(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
                void (*body)(const void* context), const void* context);

// The rest is called by a kernel's threads.

// Ends the launch; the message says in which thread and where.
[[noreturn]] void fail(const Site& site, const char* what);

void block_barrier(const Site& site);

// Meets the lanes in `mask`; the last to come runs combine(arguments, mask), arguments[lane] being
// what each passed. `ordered`: memory accesses before happen before those after, as in __syncwarp.
// `aligned`: PTX's .aligned, all lanes of the warp at one call site.
using Combine = void (*)(void* const* arguments, unsigned mask);
struct Meeting {
  Combine combine = nullptr;
  bool ordered = false;
  bool aligned = false;
};
void meet(unsigned mask, const Site& site, const Meeting& meeting, void* argument);

// The block's dynamic shared memory, exactly as long as the launch says.
unsigned char* dynamic_shared();
// A block's variable in shared memory; `key` tells variables apart.
void* static_shared(const void* key, std::size_t size);
bool is_shared(const void* begin, std::size_t size);

// cp.async of the running thread. The caller copies what pop_copy returns (see memory.h), so that
// the sanitizers see the accesses.
struct Copy {
  void* shared = nullptr;
  const void* global = nullptr;  // null: zeros
};
void queue_copy(const Copy& copy);
void commit_copies();
// Takes the oldest copy of the committed groups but the `pending` youngest; false: none is left.
bool pop_copy(std::size_t pending, Copy& copy);

}  // namespace qkern::cuda::emulator
