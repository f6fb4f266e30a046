#include "cuda_emulator/scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulator/fiber.h"
#include "cuda_emulator/sanitizers.h"
#include "messages.h"
#include "products.h"
#include "shared_memory.h"
#include "thread.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace qkern::cuda::emulator {
namespace {

constexpr std::size_t kMaxStaticShared = 48 << 10;

// One launch at a time; its state.
class Scheduler {
 public:
  const char* run(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
                  void (*body)(const void*), const void* context);

  [[noreturn]] void fail(const Site& site, const std::string& what);
  void block_barrier(const Site& site);
  void meet(unsigned mask, const Site& site, const Meeting& meeting, void* argument);
  unsigned char* dynamic_shared() { return shared_.front().data; }
  void* static_shared(const void* key, std::size_t size);
  bool is_shared(const void* begin, std::size_t size) const;
  Thread& current() { return *current_; }

 private:
  static void entry();
  void run_block();
  void start_block();
  Warp* next_warp();
  unsigned next_lane(unsigned ready);
  void make_ready(Thread& thread);
  void wait();
  void leave();
  std::string deadlock() const;
  std::uint64_t random(std::uint64_t below) { return generator_() % below; }

  std::mutex mutex_;
  Fiber main_;
  std::deque<Thread> threads_;  // at least as many as the block has; kept, for their stacks
  std::vector<Warp> warps_;
  unsigned num_threads_ = 0;
  Thread* current_ = nullptr;

  unsigned left_ = 0;  // threads that have returned
  unsigned in_barrier_ = 0;
  unsigned barrier_generation_ = 0;
  Site barrier_site_{};
  char barrier_ordering_[2] = {};  // taken in turn, for the reason given in Thread
  char launch_ordering_ = 0;
  char end_ordering_ = 0;

  std::vector<SharedVariable> shared_;  // the dynamic one first
  std::size_t dynamic_shared_bytes_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  std::mt19937_64 generator_;
  std::string failure_;
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

const char* Scheduler::run(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
                           void (*body)(const void*), const void* context) {
  const std::lock_guard<std::mutex> lock(mutex_);
  failure_ = launch_error(grid, block, dynamic_shared_bytes);
  if (!failure_.empty()) return failure_.c_str();
  body_ = body;
  context_ = context;
  dynamic_shared_bytes_ = dynamic_shared_bytes;
  gridDim = grid;
  blockDim = block;
  num_threads_ = block.x * block.y * block.z;
  generator_.seed(settings().seed);
  while (threads_.size() < num_threads_) threads_.emplace_back();
  tsan_release(&launch_ordering_);

  const std::uint64_t num_blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  std::vector<std::uint64_t> shuffled;
  if (settings().order == Order::kRandom) {
    shuffled.resize(num_blocks);
    for (std::uint64_t i = 0; i < num_blocks; ++i) shuffled[i] = i;
    std::shuffle(shuffled.begin(), shuffled.end(), generator_);
  }
  for (std::uint64_t i = 0; i < num_blocks && failure_.empty(); ++i) {
    std::uint64_t b = i;
    if (settings().order == Order::kReverse) b = num_blocks - 1 - i;
    if (settings().order == Order::kRandom) b = shuffled[i];
    blockIdx.x = static_cast<unsigned>(b % grid.x);
    blockIdx.y = static_cast<unsigned>(b / grid.x % grid.y);
    blockIdx.z = static_cast<unsigned>(b / grid.x / grid.y);
    run_block();
  }
  tsan_acquire(&end_ordering_);
  // Threads of a launch that is given up have not come to their end.
  for (unsigned i = 0; i < num_threads_ && !failure_.empty(); ++i) {
    if (threads_[i].state != State::kLeft) main_.follow(threads_[i].fiber);
  }
  return failure_.empty() ? nullptr : failure_.c_str();
}

void Scheduler::start_block() {
  shared_.clear();
  shared_.emplace_back(nullptr, dynamic_shared_bytes_);
  start_async_proxy(shared_.front());
  start_products(num_threads_);
  left_ = in_barrier_ = barrier_generation_ = 0;
  warps_.assign((num_threads_ + kWarpSize - 1) / kWarpSize, Warp{});
  for (unsigned i = 0; i < num_threads_; ++i) {
    Thread& thread = threads_[i];
    thread.linear = i;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.copies.clear();
    thread.groups.clear();
    thread.uncommitted = 0;
    thread.fenced.clear();
    thread.proxy_fences = 0;
    thread.fiber.start(&Scheduler::entry);
    make_ready(thread);
  }
}

void Scheduler::run_block() {
  start_block();
  while (left_ < num_threads_ && failure_.empty()) {
    Warp* warp = next_warp();
    if (warp == nullptr) {
      failure_ = deadlock();
      return;
    }
    const auto first = static_cast<unsigned>(warp - warps_.data()) * kWarpSize;
    current_ = &threads_[first + next_lane(warp->ready)];
    threadIdx = current_->index;
    Fiber::switch_to(main_, current_->fiber);
  }
  if (failure_.empty()) failure_ = end_products();
}

Warp* Scheduler::next_warp() {
  const auto can_run = [](const Warp& warp) { return warp.ready != 0; };
  if (settings().order == Order::kReverse) {
    const auto found = std::find_if(warps_.rbegin(), warps_.rend(), can_run);
    return found == warps_.rend() ? nullptr : &*found;
  }
  auto start = warps_.begin();
  if (settings().order == Order::kRandom) start += static_cast<long>(random(warps_.size()));
  auto found = std::find_if(start, warps_.end(), can_run);
  if (found == warps_.end()) {
    found = std::find_if(warps_.begin(), start, can_run);
    if (found == start) return nullptr;
  }
  return &*found;
}

unsigned Scheduler::next_lane(unsigned ready) {
  if (settings().order == Order::kReverse) return 31u - static_cast<unsigned>(__builtin_clz(ready));
  if (settings().order == Order::kRandom) {
    for (auto skip = random(static_cast<unsigned>(__builtin_popcount(ready))); skip > 0; --skip) {
      ready &= ready - 1;
    }
  }
  return static_cast<unsigned>(__builtin_ctz(ready));
}

void Scheduler::make_ready(Thread& thread) {
  thread.state = State::kReady;
  warps_[thread.warp()].ready |= 1u << thread.lane();
}

// Gives the others a turn; back when the scheduler picks this thread again.
void Scheduler::wait() {
  Thread& me = *current_;
  if (me.state != State::kReady) warps_[me.warp()].ready &= ~(1u << me.lane());
  Fiber::switch_to(me.fiber, main_);
}

void Scheduler::entry() {
  Scheduler& self = scheduler();
  Fiber::entered(self.main_);
  tsan_acquire(&self.launch_ordering_);
  self.body_(self.context_);
  tsan_release(&self.end_ordering_);
  self.leave();
}

void Scheduler::leave() {
  Thread& me = *current_;
  Warp& warp = warps_[me.warp()];
  me.site = {"return", "kernel", 0};
  if (in_barrier_ > 0) {
    fail(barrier_site_, text("divergent barrier: thread %u has left the kernel while %u wait",
                             me.linear, in_barrier_));
  }
  for (unsigned i = me.warp() * kWarpSize; i < std::min((me.warp() + 1) * kWarpSize, num_threads_);
       ++i) {
    const Thread& other = threads_[i];
    if (other.state == State::kInMeeting && (other.mask >> me.lane() & 1) != 0) {
      fail(other.site, text("thread %u has left the kernel while lanes wait for it", me.linear));
    }
  }
  me.state = State::kLeft;
  warp.left |= 1u << me.lane();
  warp.ready &= ~(1u << me.lane());
  ++left_;
  Fiber::switch_to(me.fiber, main_, true);
  std::abort();  // unreachable: a thread that has left is never picked
}

void Scheduler::fail(const Site& site, const std::string& what) {
  const Thread& me = *current_;
  failure_ = what + " (" + where(site) +
             text(", block %u,%u,%u, thread %u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z,
                  me.index.x, me.index.y, me.index.z);
  tsan_release(&end_ordering_);  // with the message
  Fiber::switch_to(current_->fiber, main_, true);
  std::abort();  // unreachable: the launch is over
}

void Scheduler::block_barrier(const Site& site) {
  Thread& me = *current_;
  if (left_ > 0) {
    fail(site, text("divergent barrier: %u threads of the block have left the kernel", left_));
  }
  if (in_barrier_ == 0) {
    barrier_site_ = site;
  } else if (!same_site(barrier_site_, site)) {
    fail(site, "divergent barrier: other threads wait in " + where(barrier_site_));
  }
  char* ordering = &barrier_ordering_[barrier_generation_ % 2];
  tsan_release(ordering);
  me.state = State::kInBarrier;
  me.site = site;
  if (++in_barrier_ == num_threads_) {
    in_barrier_ = 0;
    ++barrier_generation_;
    for (unsigned i = 0; i < num_threads_; ++i) make_ready(threads_[i]);
  }
  wait();
  tsan_acquire(ordering);
}

void Scheduler::meet(unsigned mask, const Site& site, const Meeting& meeting, void* argument) {
  Thread& me = *current_;
  Warp& warp = warps_[me.warp()];
  const unsigned first = me.warp() * kWarpSize;
  const unsigned lanes = std::min<unsigned>(kWarpSize, num_threads_ - first);
  const unsigned existing = lanes == kWarpSize ? kFullMask : (1u << lanes) - 1;
  if ((mask >> me.lane() & 1) == 0) {
    fail(site, text("mask 0x%08x lacks the calling lane %u", mask, me.lane()));
  }
  if ((mask & ~existing) != 0) {
    fail(site, text("mask 0x%08x names lanes that the block does not have: it has %u threads", mask,
                    num_threads_));
  }
  if ((mask & warp.left) != 0) {
    fail(site,
         text("mask 0x%08x names lanes that have left the kernel: 0x%08x", mask, mask & warp.left));
  }
  if (meeting.aligned && mask != existing) fail(site, "needs all lanes of the warp");
  me.state = State::kInMeeting;
  me.site = site;
  me.mask = mask;
  me.meeting = meeting;
  me.argument = argument;

  void* arguments[kWarpSize] = {};
  bool complete = true;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Thread& other = threads_[first + lane];
    // A lane in my mask may wait with another mask: that meeting comes first.
    const bool waits = other.state == State::kInMeeting && other.mask == mask;
    if ((mask >> lane & 1) == 0) continue;
    if (waits && (other.meeting.combine != meeting.combine ||
                  (meeting.aligned && !same_site(other.site, site)))) {
      fail(site,
           text("lane %u waits with the same mask 0x%08x in ", lane, mask) + where(other.site));
    }
    arguments[lane] = other.argument;
    complete = complete && waits;
  }
  if (meeting.ordered) tsan_release(&me.arrived);
  if (complete) {
    if (meeting.combine != nullptr) meeting.combine(arguments, mask);
    for (unsigned lane = 0; lane < lanes && meeting.ordered; ++lane) {
      if ((mask >> lane & 1) != 0) tsan_acquire(&threads_[first + lane].arrived);
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      if (meeting.ordered) tsan_release(&threads_[first + lane].released);
      make_ready(threads_[first + lane]);
    }
  }
  wait();
  if (meeting.ordered) tsan_acquire(&me.released);
}

void* Scheduler::static_shared(const void* key, std::size_t size) {
  std::size_t total = size;
  {
    const TsanIgnores ignores;
    for (const SharedVariable& variable : shared_) {
      if (variable.key == key) return variable.data;
      if (variable.key != nullptr) total += variable.size;
    }
  }
  if (total > kMaxStaticShared) {
    fail({"shared memory", "kernel", 0}, text("%zu bytes of static shared memory; a device takes "
                                              "49152",
                                              total));
  }
  const TsanIgnores ignores;
  return shared_.emplace_back(key, size).data;
}

bool Scheduler::is_shared(const void* begin, std::size_t size) const {
  return std::any_of(shared_.begin(), shared_.end(),
                     [&](const SharedVariable& variable) { return variable.holds(begin, size); });
}

std::string Scheduler::deadlock() const {
  std::vector<std::pair<Site, unsigned>> sites;
  for (unsigned i = 0; i < num_threads_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == State::kLeft) continue;
    const auto known = std::find_if(sites.begin(), sites.end(), [&](const auto& entry) {
      return same_site(entry.first, thread.site);
    });
    if (known == sites.end()) {
      sites.emplace_back(thread.site, 1);
    } else {
      ++known->second;
    }
  }
  std::string message = text("deadlock in block %u,%u,%u:", blockIdx.x, blockIdx.y, blockIdx.z);
  for (const auto& [site, count] : sites)
    message += text(" %u wait in ", count) + where(site) + ";";
  return message + text(" %u have left", left_);
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}

Launches& launches() {
  static Launches instance;
  return instance;
}

const char* run(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, void (*body)(const void*),
                const void* context) {
  return scheduler().run(grid, block, dynamic_shared_bytes, body, context);
}

void fail(const Site& site, const char* what) { scheduler().fail(site, what); }
void block_barrier(const Site& site) { scheduler().block_barrier(site); }
void meet(unsigned mask, const Site& site, const Meeting& meeting, void* argument) {
  scheduler().meet(mask, site, meeting, argument);
}
unsigned char* dynamic_shared() { return scheduler().dynamic_shared(); }
void* static_shared(const void* key, std::size_t size) {
  return scheduler().static_shared(key, size);
}
bool is_shared(const void* begin, std::size_t size) { return scheduler().is_shared(begin, size); }
Thread& running_thread() { return scheduler().current(); }

}  // namespace qkern::cuda::emulator
