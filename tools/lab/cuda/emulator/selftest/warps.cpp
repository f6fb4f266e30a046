// What a warp's lanes do together: shuffles and votes, ldmatrix and mma.
#include "selftest.h"

#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>

namespace selftest {
namespace {

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

std::string warp_sum() {
  Buffer<unsigned> out(64);
  const char* failure = emulator::launch(dim3(1), dim3(64), 0, [&] {
    // Modulo 2^32; in the second warp another's.
    out[threadIdx.x] = cuda::warp_sum(threadIdx.x * 0x04000001u);
  });
  bool right = true;
  for (unsigned i = 0; i < 64; ++i) {
    const unsigned numbers = i < 32 ? 31 * 16 : 31 * 16 + 32 * 32;
    right = right && out[i] == numbers * 0x04000001u;
  }
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

}  // namespace

Tests warps() {
  return {
      {"shuffles", shuffles},
      {"warp_max", warp_max},
      {"warp_sum", warp_sum},
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
  };
}

}  // namespace selftest
