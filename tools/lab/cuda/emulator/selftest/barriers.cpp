// Shared memory, barriers, and races between blocks.
#include "selftest.h"

#include <cmath>

#include "cuda_emulator/sanitizers.h"

namespace selftest {
namespace {

// Reverses a line through shared memory, twice: the second pass overwrites what the first read.
template <bool kBarrierBefore, bool kBarrierAfter>
void reverse_kernel(const float* in, float* out) {
  QKERN_SHARED(Line, line);
  const unsigned i = threadIdx.x;
  for (int pass = 0; pass < 2; ++pass) {
    line[i] = in[i + pass * kThreads];
    if (kBarrierBefore) __syncthreads();
    out[i + pass * kThreads] = line[kThreads - 1 - i];
    if (kBarrierAfter) __syncthreads();
  }
}

template <bool kBarrierBefore, bool kBarrierAfter>
std::string reverse() {
  Buffer<float> in = iota(2 * kThreads);
  Buffer<float> out(2 * kThreads);
  const char* failure = emulator::launch(dim3(1), dim3(kThreads), 0, [&] {
    reverse_kernel<kBarrierBefore, kBarrierAfter>(in.get(), out.get());
  });
  bool right = true;
  for (unsigned i = 0; i < 2 * kThreads; ++i) {
    const unsigned from = i / kThreads * kThreads + kThreads - 1 - i % kThreads;
    right = right && out[i] == static_cast<float>(from);
  }
  return outcome(failure, right);
}

// The same within a warp.
template <bool kBarrier>
void reverse_warp_kernel(float* out) {
  QKERN_SHARED(Line, line);
  const unsigned i = threadIdx.x;
  line[i] = static_cast<float>(i);
  if (kBarrier) __syncwarp();
  out[i] = line[i ^ 31];
}

template <bool kBarrier>
std::string reverse_warp() {
  Buffer<float> out(kThreads);
  const char* failure = emulator::launch(dim3(1), dim3(kThreads), 0,
                                         [&] { reverse_warp_kernel<kBarrier>(out.get()); });
  bool right = true;
  for (unsigned i = 0; i < kThreads; ++i) right = right && out[i] == static_cast<float>(i ^ 31);
  return outcome(failure, right);
}

// Shared memory starts as NaN in every block, also where the block before left values.
void uninitialised_kernel(float* out) {
  QKERN_SHARED(float, value);
  QKERN_DYNAMIC_SHARED(bytes);
  auto* dynamic = reinterpret_cast<float*>(bytes);
  out[2 * blockIdx.x] = value;
  out[2 * blockIdx.x + 1] = dynamic[0];
  value = dynamic[0] = 1.0f;
}

std::string uninitialised() {
  Buffer<float> out(6);
  const char* failure =
      emulator::launch(dim3(3), dim3(1), sizeof(float), [&] { uninitialised_kernel(out.get()); });
  bool right = true;
  for (unsigned i = 0; i < 6; ++i) right = right && std::isnan(out[i]);
  return outcome(failure, right);
}

std::string divergent_sites() {
  return run(64, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
}

std::string divergent_return() {
  return run(64, [] {
    if (threadIdx.x == 7) return;
    __syncthreads();
  });
}

std::string deadlock() {
  return run(64, [] {
    if (threadIdx.x % 2 == 0) __syncwarp();
    __syncthreads();
  });
}

std::string static_shared_too_large() {
  using Large = unsigned char[(48 << 10) + 1];
  return run(1, [] {
    QKERN_SHARED(Large, large);
    large[0] = 0;
  });
}

// As the emulator itself may: what holds up a launch comes while the thread is ignored.
std::string failure_while_ignored() {
  return run(64, [] {
    const emulator::TsanIgnores ignores;
    if (threadIdx.x == 7) emulator::fail({"self test", __FILE__, 0}, "given up");
  });
}

template <bool kOwn>
std::string blocks_write() {
  Buffer<float> out(2);
  return run(1, [&] { out.get()[kOwn ? blockIdx.x : 0] = static_cast<float>(blockIdx.x); });
}

std::string counted_by_atomics() {
  unsigned long long count = 0;
  const char* failure = emulator::launch(dim3(3), dim3(64), 0, [&] { atomicAdd(&count, 2); });
  return outcome(failure, count == 3 * 64 * 2);
}

}  // namespace

Tests barriers() {
  return {
      {"reverse", reverse<true, true>},
      {"reverse_without_barrier", reverse<false, true>},
      {"reverse_without_trailing_barrier", reverse<true, false>},
      {"reverse_warp", reverse_warp<true>},
      {"reverse_warp_without_barrier", reverse_warp<false>},
      {"uninitialised", uninitialised},
      {"divergent_sites", divergent_sites},
      {"divergent_return", divergent_return},
      {"deadlock", deadlock},
      {"static_shared_too_large", static_shared_too_large},
      {"failure_while_ignored", failure_while_ignored},
      {"blocks_write_their_own", blocks_write<true>},
      {"blocks_write_the_same", blocks_write<false>},
      {"counted_by_atomics", counted_by_atomics},
  };
}

}  // namespace selftest
