// The emulator's own tests: small kernels that are right, and ones with one mistake each.
//
//   emulator_selftest NAME ORDER SEED CP_ASYNC CAPABILITY
//
// runs one and prints "ok", "wrong: ..." (it ran, with a wrong result) or "failed: ..." (the
// emulator's message). tests/cuda/test_emulator.py knows what each must print, and when.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "cuda_emulator_ptx.h"

namespace {

using qkern::BFloat16;
using qkern::Float16;
namespace cuda = qkern::cuda;
namespace emulator = qkern::cuda::emulator;

constexpr unsigned kAll = 0xffffffffu;

std::string outcome(const char* failure, bool right) {
  if (failure != nullptr) return std::string("failed: ") + failure;
  return right ? "ok" : "wrong: result";
}

// Exactly as long as asked for, so that AddressSanitizer knows where it ends; 16-aligned.
template <typename T>
struct Buffer {
  std::unique_ptr<T[], decltype(&std::free)> data;
  std::size_t size;
  explicit Buffer(std::size_t n, T value = T{})
      : data(static_cast<T*>(std::malloc(n * sizeof(T))), &std::free), size(n) {
    for (std::size_t i = 0; i < n; ++i) data[i] = value;
  }
  T* get() { return data.get(); }
  T& operator[](std::size_t i) { return data[i]; }
};

Buffer<float> iota(std::size_t n) {
  Buffer<float> buffer(n);
  for (std::size_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(i);
  return buffer;
}

// ---- Shared memory and barriers.

constexpr unsigned kThreads = 128;
using Line = float[kThreads];

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

std::string run(unsigned threads, const std::function<void()>& body, std::size_t shared = 0) {
  return outcome(emulator::launch(dim3(2), dim3(threads), shared, body), true);
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

// ---- Bounds and alignment.

std::string misaligned_load() {
  Buffer<float> in = iota(16);
  return run(1, [&] { cuda::load_global16(in.get() + 1); });
}

std::string misaligned_store() {
  Buffer<float> out(16);
  return run(1, [&] { cuda::store_global16(out.get() + 2, uint4{}); });
}

std::string misaligned_words() {
  Buffer<std::uint32_t> in(8);
  return run(1, [&] {
    std::uint32_t words[2];
    cuda::load_words(in.get() + 1, words);
  });
}

template <int kWords>
bool copies_words() {
  Buffer<std::uint32_t> in(8), out(8);
  for (unsigned i = 0; i < 8; ++i) in[i] = 10 + i;
  const char* failure = emulator::launch(dim3(1), dim3(1), 0, [&] {
    std::uint32_t words[kWords];
    cuda::load_words(in.get() + 4, words);
    cuda::store_words(out.get() + 4, words);
  });
  bool right = failure == nullptr;
  for (unsigned i = 0; i < 8; ++i) {
    right = right && out[i] == (i >= 4 && i < 4 + kWords ? 10 + i : 0);
  }
  return right;
}

std::string words() {
  return outcome(nullptr, copies_words<1>() && copies_words<2>() && copies_words<4>());
}

std::string misaligned_copy() {
  Buffer<float> in = iota(16);
  return run(
      1,
      [&] {
        QKERN_DYNAMIC_SHARED(shared);
        cuda::cp_async16(shared + 8, in.get(), true);
      },
      32);
}

std::string copy_beyond_shared() {
  Buffer<float> in = iota(16);
  return run(
      1,
      [&] {
        QKERN_DYNAMIC_SHARED(shared);
        cuda::cp_async16(shared + 16, in.get(), true);
      },
      24);
}

std::string global_out_of_bounds() {
  Buffer<float> out(kThreads - 1);
  return run(kThreads, [&] { out.get()[threadIdx.x] = 1.0f; });
}

std::string static_shared_out_of_bounds() {
  return run(kThreads, [] {
    QKERN_SHARED(Line, line);
    static_cast<volatile float*>(line)[threadIdx.x + 1] = 1.0f;
  });
}

std::string dynamic_shared_out_of_bounds() {
  return run(
      kThreads,
      [] {
        QKERN_DYNAMIC_SHARED(shared);
        static_cast<volatile unsigned char*>(shared)[threadIdx.x] = 1;
      },
      kThreads - 1);
}

// ---- Races that no barrier of a block could prevent.

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

// ---- cp.async.

// Sums rows of a matrix that is copied to shared memory, kStages rows ahead.
template <int kPending, bool kWait>
void sum_rows_kernel(const float* in, int rows, float* out) {
  constexpr int kStages = 3;
  QKERN_DYNAMIC_SHARED(bytes);
  auto* stages = reinterpret_cast<float*>(bytes);
  const unsigned i = threadIdx.x;
  const auto fetch = [&](int row) {
    if (row < rows && i < kThreads / 4) {
      cuda::cp_async16(stages + row % kStages * kThreads + 4 * i, in + row * kThreads + 4 * i,
                       true);
    }
    cuda::cp_async_commit();
  };
  for (int row = 0; row < kStages - 1; ++row) fetch(row);
  float sum = 0;
  for (int row = 0; row < rows; ++row) {
    if (kWait) cuda::cp_async_wait<kPending>();
    __syncthreads();
    fetch(row + kStages - 1);
    sum += stages[row % kStages * kThreads + (kThreads - 1 - i)];
  }
  out[i] = sum;
}

template <int kPending, bool kWait>
std::string sum_rows() {
  constexpr int kRows = 9;
  Buffer<float> in = iota(kRows * kThreads);
  Buffer<float> out(kThreads);
  const char* failure =
      emulator::launch(dim3(1), dim3(kThreads), 3 * kThreads * sizeof(float),
                       [&] { sum_rows_kernel<kPending, kWait>(in.get(), kRows, out.get()); });
  bool right = true;
  for (unsigned i = 0; i < kThreads; ++i) {
    float sum = 0;
    for (int row = 0; row < kRows; ++row) sum += in[row * kThreads + kThreads - 1 - i];
    right = right && out[i] == sum;
  }
  return outcome(failure, right);
}

// One stage only: the next row's copy starts while other threads still read this one.
std::string copy_over_what_is_read() {
  Buffer<float> in = iota(2 * kThreads);
  Buffer<float> out(kThreads);
  const char* failure = emulator::launch(dim3(1), dim3(kThreads), kThreads * sizeof(float), [&] {
    QKERN_DYNAMIC_SHARED(bytes);
    auto* stage = reinterpret_cast<float*>(bytes);
    const unsigned i = threadIdx.x;
    float sum = 0;
    for (int row = 0; row < 2; ++row) {
      if (i < kThreads / 4) {
        cuda::cp_async16(stage + 4 * i, in.get() + row * kThreads + 4 * i, true);
      }
      cuda::cp_async_commit();
      cuda::cp_async_wait<0>();
      __syncthreads();
      sum += stage[kThreads - 1 - i];
    }
    out[i] = sum;
  });
  bool right = true;
  for (unsigned i = 0; i < kThreads; ++i) {
    right = right && out[i] == in[kThreads - 1 - i] + in[2 * kThreads - 1 - i];
  }
  return outcome(failure, right);
}

std::string copy_zero_fill() {
  Buffer<float> out(4, 1.0f);
  const char* failure = emulator::launch(dim3(1), dim3(1), 16, [&] {
    QKERN_DYNAMIC_SHARED(shared);
    cuda::cp_async16(shared, nullptr, false);
    cuda::cp_async_commit();
    cuda::cp_async_wait<0>();
    cuda::store_global16(out.get(), cuda::load_global16(shared));
  });
  return outcome(failure, out[0] == 0 && out[1] == 0 && out[2] == 0 && out[3] == 0);
}

// ---- Warp intrinsics.

std::string shuffles() {
  Buffer<int> out(4 * 32);
  const char* failure = emulator::launch(dim3(1), dim3(8, 4), 0, [&] {
    const int lane = static_cast<int>(threadIdx.x + 8 * threadIdx.y);
    out[lane] = __shfl_sync(kAll, lane, lane + 3, 8);
    out[32 + lane] = __shfl_xor_sync(kAll, lane, 5);
    out[64 + lane] = __shfl_down_sync(kAll, lane, 9u);
    out[96 + lane] = static_cast<int>(__shfl_up_sync(kAll, 2.0 * lane, 2u, 16));
  });
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    right = right && out[lane] == lane / 8 * 8 + (lane + 3) % 8;
    right = right && out[32 + lane] == (lane ^ 5);
    right = right && out[64 + lane] == (lane + 9 < 32 ? lane + 9 : lane);
    right = right && out[96 + lane] == 2 * (lane % 16 >= 2 ? lane - 2 : lane);
  }
  return outcome(failure, right);
}

std::string warp_max() {
  Buffer<unsigned> out(64);
  const char* failure = emulator::launch(dim3(1), dim3(64), 0, [&] {
    // The largest as unsigned; in the second warp another's.
    out[threadIdx.x] = cuda::warp_max(threadIdx.x * 0x04000001u);
  });
  bool right = true;
  for (unsigned i = 0; i < 64; ++i) right = right && out[i] == (i | 31u) * 0x04000001u;
  return outcome(failure, right);
}

std::string votes() {
  Buffer<bool> right(32);
  const char* failure = emulator::launch(dim3(1), dim3(32), 0, [&] {
    const int lane = static_cast<int>(threadIdx.x);
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;  // two meetings in one warp
    right[lane] = __ballot_sync(half, lane % 3 == 0) == (0x49249249u & half) &&
                  __any_sync(kAll, lane == 30) && !__any_sync(kAll, lane == 32) &&
                  __all_sync(kAll, lane < 32) && !__all_sync(kAll, lane < 31);
  });
  bool all = true;
  for (int lane = 0; lane < 32; ++lane) all = all && right[lane];
  return outcome(failure, all);
}

std::string lane_not_in_mask() {
  return run(32, [] { __syncwarp(0xfffffffeu); });
}
std::string mask_beyond_block() {
  return run(40, [] { __syncwarp(); });
}
std::string mask_of_left_lane() {
  return run(32, [] {
    if (threadIdx.x != 3) __syncwarp();
  });
}
std::string shuffle_outside_mask() {
  return run(32, [] {
    if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1, 16);
  });
}
std::string different_operations() {
  return run(32, [] {
    if (threadIdx.x < 16) {
      __shfl_xor_sync(kAll, 1, 1);
    } else {
      __ballot_sync(kAll, 1);
    }
  });
}

// ---- ldmatrix and mma.

template <typename T>
std::uint16_t encode(float x);
template <>
std::uint16_t encode<Float16>(float x) {
  return __float2half_rn(x).bits;
}
template <>
std::uint16_t encode<BFloat16>(float x) {
  return __float2bfloat16_rn(x).bits;
}

// Small integers: products and sums are exact, so the result has one right value whatever the order
// of summation, and every element of a, b and d is distinguishable.
struct Problem {
  static constexpr int kM = 16, kN = 8, kK = 16;
  float a[kM][kK], b[kK][kN], c[kM][kN], d[kM][kN];
  explicit Problem(int depth) {
    std::mt19937 generator(7);
    const auto value = [&] { return static_cast<float>(static_cast<int>(generator() % 31) - 15); };
    for (auto& row : a) {
      for (float& x : row) x = value();
    }
    for (auto& row : b) {
      for (float& x : row) x = value();
    }
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        d[m][n] = c[m][n] = 100.0f * value();
        for (int k = 0; k < depth; ++k) d[m][n] += a[m][k] * b[k][n];
      }
    }
  }
};

// Fragments filled by the formulas that the PTX ISA gives for element i of each (section "Matrix
// Fragments for mma.m16n8k16 / m16n8k8 with floating point type"), not by the emulator's own.
template <typename T, int kDepth>
std::string mma_layout() {
  const Problem problem(kDepth);
  Buffer<float> out(16 * 8);
  constexpr int kA = kDepth / 2;  // elements of a in a lane
  constexpr int kB = kDepth / 4;
  const char* failure = emulator::launch(dim3(1), dim3(32), 0, [&] {
    const int group = static_cast<int>(threadIdx.x) >> 2;
    const int in_group = static_cast<int>(threadIdx.x) % 4;
    std::uint16_t a[kA];
    std::uint16_t b[kB];
    for (int i = 0; i < kA; ++i) {
      const bool upper = kDepth == 8 ? i < 2 : (i < 2 || (i >= 4 && i < 6));
      const int row = upper ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[i] = encode<T>(problem.a[row][column]);
    }
    for (int i = 0; i < kB; ++i) {
      b[i] = encode<T>(problem.b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group]);
    }
    float d[4];
    for (int i = 0; i < 4; ++i) {
      d[i] = problem.c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
    }
    std::uint32_t a_registers[kA / 2];
    std::uint32_t b_registers[kB / 2];
    std::memcpy(a_registers, a, sizeof a);
    std::memcpy(b_registers, b, sizeof b);
    if constexpr (kDepth == 16) {
      cuda::mma_16x8x16<T>(d, a_registers, b_registers);
    } else {
      const auto type =
          std::is_same_v<T, Float16> ? emulator::MmaType::kFloat16 : emulator::MmaType::kBFloat16;
      emulator::mma<8>(type, d, a_registers, b_registers, {"mma", __FILE__, __LINE__});
    }
    for (int i = 0; i < 4; ++i) {
      out[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
    }
  });
  return outcome(failure, std::memcmp(out.get(), problem.d, sizeof problem.d) == 0);
}

// a by ldmatrix.x4 and b by ldmatrix.x2.trans from plain row-major matrices: what the documentation
// of ldmatrix promises to be mma's fragments.
std::string ldmatrix_feeds_mma() {
  const Problem problem(16);
  Buffer<float> out(16 * 8);
  using MatrixA = std::uint16_t[16][16];
  using MatrixB = std::uint16_t[16][8];
  const char* failure = emulator::launch(dim3(1), dim3(32), 0, [&] {
    QKERN_SHARED(MatrixA, a);
    QKERN_SHARED(MatrixB, b);
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < 256; i += 32)
      a[i / 16][i % 16] = encode<BFloat16>(problem.a[i / 16][i % 16]);
    for (int i = lane; i < 128; i += 32)
      b[i / 8][i % 8] = encode<BFloat16>(problem.b[i / 8][i % 8]);
    __syncwarp();
    std::uint32_t a_registers[4];
    std::uint32_t b_registers[2];
    const emulator::Site site{"ldmatrix", __FILE__, __LINE__};
    emulator::ldmatrix(a_registers, &a[lane % 16][lane / 16 * 8], false, site);
    emulator::ldmatrix(b_registers, &b[lane % 16][0], true, site);
    float d[4];
    const int row = lane / 4;
    const int column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) d[i] = problem.c[row + i / 2 * 8][column + i % 2];
    cuda::mma_16x8x16<BFloat16>(d, a_registers, b_registers);
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
  });
  return outcome(failure, std::memcmp(out.get(), problem.d, sizeof problem.d) == 0);
}

std::string mma_of_half_a_warp() {
  return run(32, [] {
    if (threadIdx.x >= 16) return;
    float d[4] = {};
    cuda::mma_16x8x16<BFloat16>(d, {0, 0, 0, 0}, {0, 0});
  });
}

// ---- Arithmetic.

// Around every point where the nearest 16-bit value changes: the point itself goes to the even
// neighbour, the floats beside it to the nearer one. `value` decodes without the emulator.
bool rounds_to_nearest(std::uint16_t infinity, const std::function<double(unsigned)>& value,
                       const std::function<std::uint16_t(float)>& convert) {
  for (unsigned low = 0; low < infinity; ++low) {
    const auto middle = static_cast<float>((value(low) + value(low + 1)) / 2);
    const unsigned even = low % 2 == 0 ? low : low + 1;
    for (const unsigned sign : {0u, 0x8000u}) {
      const float s = sign == 0 ? 1.0f : -1.0f;
      if (convert(s * middle) != (sign | even)) return false;
      if (convert(s * std::nextafterf(middle, 0.0f)) != (sign | low)) return false;
      if (convert(s * std::nextafterf(middle, INFINITY)) != (sign | (low + 1))) return false;
      if (convert(s * static_cast<float>(value(low))) != (sign | low)) return false;
    }
  }
  return convert(INFINITY) == infinity && (convert(NAN) & 0x7fff) > infinity;
}

double binary(unsigned bits, int mantissa_bits, int bias) {
  const unsigned mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits);
  if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias - mantissa_bits);
}

std::string conversions() {
  // One above the largest finite value is what infinity's neighbour would be: 2^16 and 2^128.
  bool right = rounds_to_nearest(
      0x7c00, [](unsigned bits) { return binary(bits, 10, 15); },
      [](float x) { return __float2half_rn(x).bits; });
  for (unsigned bits = 0; bits < 0x7c00; ++bits) {
    right = right && __half2float({static_cast<std::uint16_t>(bits)}) == binary(bits, 10, 15);
  }
  right = right && std::isinf(__half2float({0xfc00})) && std::isnan(__half2float({0x7c01}));
  // bfloat16's last step, to infinity, has its middle beyond float32's range of midpoints checked
  // by `rounds_to_nearest` in float32: it is exact there, too (1.5 ulp of 8 bits).
  right = right && rounds_to_nearest(
                       0x7f80, [](unsigned bits) { return binary(bits, 7, 127); },
                       [](float x) { return __float2bfloat16_rn(x).bits; });
  right = right && std::signbit(__half2float(__float2half_rn(-0.0f)));
  return outcome(nullptr, right);
}

std::string byte_perm() {
  const bool right = __byte_perm(0x33221100, 0x77665544, 0x3210) == 0x33221100 &&
                     __byte_perm(0x33221100, 0x77665544, 0x7654) == 0x77665544 &&
                     __byte_perm(0x33221100, 0x77665544, 0x0246) == 0x00224466 &&
                     __byte_perm(0x80000000, 0x0000007f, 0xcb3b) == 0x00ff80ff;
  return outcome(nullptr, right);
}

// Differs from the two roundings asked for if anything fuses them.
std::string never_contracted() {
  volatile float a = 1.0f + 0x1p-12f;
  volatile float c = -1.0f - 0x1p-11f;
  return outcome(nullptr, __fadd_rn(__fmul_rn(a, a), c) == 0.0f && __fmaf_rn(a, a, c) == 0x1p-24f &&
                              __fsqrt_rn(a) == 1.0f + 0x1p-13f);
}

// ---- Grids.

std::string grids() {
  bool right = true;
  for (const auto& [grid, block] :
       {std::pair{dim3(3, 2, 2), dim3(5, 3, 7)}, std::pair{dim3(1), dim3(1024)},
        std::pair{dim3(70000), dim3(1)}}) {
    const std::size_t threads = std::size_t{block.x} * block.y * block.z;
    const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
    Buffer<int> seen(threads * blocks);
    const char* failure = emulator::launch(grid, block, 0, [&] {
      const std::size_t b =
          blockIdx.x + gridDim.x * (blockIdx.y + std::size_t{gridDim.y} * blockIdx.z);
      const std::size_t t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      ++seen[b * threads + t];
    });
    if (failure != nullptr) return outcome(failure, false);
    for (std::size_t i = 0; i < threads * blocks; ++i) right = right && seen[i] == 1;
  }
  return outcome(nullptr, right);
}

std::string launch_limits() {
  const auto refused = [](dim3 grid, dim3 block, std::size_t shared) {
    return emulator::launch(grid, block, shared, [] {}) != nullptr;
  };
  return outcome(nullptr, refused(dim3(1), dim3(1025), 0) && refused(dim3(0), dim3(1), 0) &&
                              refused(dim3(1, 65536), dim3(1), 0) && refused(dim3(1), dim3(0), 0) &&
                              refused(dim3(1), dim3(1), 228 << 10) &&
                              !refused(dim3(1), dim3(1024), 64 << 10));
}

const std::map<std::string, std::function<std::string()>> kTests = {
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
    {"misaligned_load", misaligned_load},
    {"misaligned_store", misaligned_store},
    {"misaligned_words", misaligned_words},
    {"misaligned_copy", misaligned_copy},
    {"copy_beyond_shared", copy_beyond_shared},
    {"global_out_of_bounds", global_out_of_bounds},
    {"static_shared_out_of_bounds", static_shared_out_of_bounds},
    {"dynamic_shared_out_of_bounds", dynamic_shared_out_of_bounds},
    {"blocks_write_their_own", blocks_write<true>},
    {"blocks_write_the_same", blocks_write<false>},
    {"counted_by_atomics", counted_by_atomics},
    {"sum_rows", sum_rows<1, true>},
    {"sum_rows_waiting_too_little", sum_rows<2, true>},
    {"sum_rows_without_wait", sum_rows<0, false>},
    {"copy_over_what_is_read", copy_over_what_is_read},
    {"copy_zero_fill", copy_zero_fill},
    {"words", words},
    {"shuffles", shuffles},
    {"warp_max", warp_max},
    {"votes", votes},
    {"lane_not_in_mask", lane_not_in_mask},
    {"mask_beyond_block", mask_beyond_block},
    {"mask_of_left_lane", mask_of_left_lane},
    {"shuffle_outside_mask", shuffle_outside_mask},
    {"different_operations", different_operations},
    {"mma_f16_k8", mma_layout<Float16, 8>},
    {"mma_f16_k16", mma_layout<Float16, 16>},
    {"mma_bf16_k8", mma_layout<BFloat16, 8>},
    {"mma_bf16_k16", mma_layout<BFloat16, 16>},
    {"ldmatrix_feeds_mma", ldmatrix_feeds_mma},
    {"mma_of_half_a_warp", mma_of_half_a_warp},
    {"conversions", conversions},
    {"byte_perm", byte_perm},
    {"never_contracted", never_contracted},
    {"grids", grids},
    {"launch_limits", launch_limits},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fputs("usage: emulator_selftest NAME ORDER SEED CP_ASYNC CAPABILITY\n", stderr);
    return 2;
  }
  const std::map<std::string, emulator::Order> orders = {{"forward", emulator::Order::kForward},
                                                         {"reverse", emulator::Order::kReverse},
                                                         {"random", emulator::Order::kRandom}};
  emulator::Settings& settings = emulator::settings();
  settings.order = orders.at(argv[2]);
  settings.seed = std::strtoull(argv[3], nullptr, 10);
  settings.cp_async =
      std::string(argv[4]) == "early" ? emulator::CpAsync::kEarly : emulator::CpAsync::kLate;
  settings.capability = std::atoi(argv[5]);
  std::puts(kTests.at(argv[1])().c_str());
  return 0;
}
