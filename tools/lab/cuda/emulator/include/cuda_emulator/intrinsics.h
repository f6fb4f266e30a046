#pragma once

#include <math.h>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_emulator/float16.h"
#include "cuda_emulator/memory.h"
#include "cuda_emulator/scheduler.h"

// CUDA's barriers, warp intrinsics and arithmetic under their own names. Every one that can fail
// takes the place of its call by default arguments.
#define QKERN_EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(QKERN_EMULATOR_SITE) {
  qkern::cuda::emulator::block_barrier({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, QKERN_EMULATOR_SITE) {
  qkern::cuda::emulator::meet(mask, {"__syncwarp", file, line}, {nullptr, true, false}, nullptr);
}

namespace qkern::cuda::emulator {

// A shuffle of one or two 32-bit words. `source` is the lane read.
struct ShuffleLane {
  std::uint32_t value[2];
  std::uint32_t result[2];
  int source;
  bool outside_mask;
};
void combine_shuffle(void* const* lanes, unsigned mask);

struct VoteLane {
  bool predicate;
  std::uint32_t ballot;
};
void combine_vote(void* const* lanes, unsigned mask);

inline int lane_id() {
  const unsigned linear = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  return static_cast<int>(linear % kWarpSize);
}

// `source` leaves the segment of `width` lanes that holds the caller: the caller's own value.
template <typename T>
T shuffle(unsigned mask, const T& value, int source, int width, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(ShuffleLane::value));
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail(site, "width: takes a power of two up to 32");
  }
  const int own = lane_id();
  if (source < 0 || source / width != own / width) source = own;
  ShuffleLane lane{};
  std::memcpy(lane.value, &value, sizeof(T));
  lane.source = source;
  meet(mask, site, {combine_shuffle, false, false}, &lane);
  if (lane.outside_mask) fail(site, "reads a lane outside the mask");
  T result;
  std::memcpy(&result, lane.result, sizeof(T));
  return result;
}

inline unsigned vote(unsigned mask, bool predicate, const Site& site) {
  VoteLane lane{predicate, 0};
  meet(mask, site, {combine_vote, false, false}, &lane);
  return lane.ballot;
}

}  // namespace qkern::cuda::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, QKERN_EMULATOR_SITE) {
  const int first = qkern::cuda::emulator::lane_id() & ~(width - 1);
  return qkern::cuda::emulator::shuffle(mask, value, first | (source & (width - 1)), width,
                                        {"__shfl_sync", file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, QKERN_EMULATOR_SITE) {
  return qkern::cuda::emulator::shuffle(mask, value, qkern::cuda::emulator::lane_id() ^ bits, width,
                                        {"__shfl_xor_sync", file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, QKERN_EMULATOR_SITE) {
  return qkern::cuda::emulator::shuffle(mask, value,
                                        qkern::cuda::emulator::lane_id() + static_cast<int>(delta),
                                        width, {"__shfl_down_sync", file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, QKERN_EMULATOR_SITE) {
  return qkern::cuda::emulator::shuffle(mask, value,
                                        qkern::cuda::emulator::lane_id() - static_cast<int>(delta),
                                        width, {"__shfl_up_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, QKERN_EMULATOR_SITE) {
  return qkern::cuda::emulator::vote(mask, predicate != 0, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, QKERN_EMULATOR_SITE) {
  return qkern::cuda::emulator::vote(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, QKERN_EMULATOR_SITE) {
  return qkern::cuda::emulator::vote(mask, predicate != 0, {"__all_sync", file, line}) == mask;
}

template <typename T>
T __ldg(const T* p, QKERN_EMULATOR_SITE) {
  return qkern::cuda::emulator::load<T>(p, {"__ldg", file, line});
}

// Atomic for ThreadSanitizer; the fibers themselves never interrupt one another.
template <typename T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  static_assert(std::is_integral_v<T>, "a float32 sum by atomics has no order");
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicOr(T* p, std::common_type_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);
}

// One rounding each, to nearest, and never contracted with a neighbour. The compiler cannot see
// through the barrier, so this holds in a build that contracts everything else.
namespace qkern::cuda::emulator {
template <typename T>
T rounded(T x) {
  asm volatile("" : "+m"(x));
  return x;
}
}  // namespace qkern::cuda::emulator

inline float __fadd_rn(float a, float b) { return qkern::cuda::emulator::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return qkern::cuda::emulator::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return qkern::cuda::emulator::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return ::sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return qkern::cuda::emulator::rounded(a + b); }
inline double __dsub_rn(double a, double b) { return qkern::cuda::emulator::rounded(a - b); }
inline double __dmul_rn(double a, double b) { return qkern::cuda::emulator::rounded(a * b); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Byte i of the result is the one of (high, low) that hexadecimal digit i of the selector names:
// 0 to 3 in low, 4 to 7 in high; with bit 3 set, its sign eight times.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> (4 * i) & 0xf;
    auto byte = static_cast<unsigned>(bytes >> (8 * (digit & 7)) & 0xff);
    if ((digit & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
