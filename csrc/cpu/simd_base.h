// What the instruction sets' Simd have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "kernel_table.h"

#define QKERN_HAS_SIMD 1

// Before a loop over a few registers inside a loop over memory. GCC unrolls it otherwise too, but
// so late that it still stores the registers' array in every turn.
#if defined(__clang__)
#define QKERN_UNROLL _Pragma("unroll")
#else
#define QKERN_UNROLL _Pragma("GCC unroll 8")
#endif

namespace qkern::cpu {
namespace {

// Where a look-up serves one register of codes; see simd_neon.h for the other way. Besides these,
// a Simd has kTileRows, the rows of the matmul's register tile, which is two registers wide;
// kVectorAccumulators, of the matrix-vector kernel; and kVectorFactors, the factors (rows of W
// times rows of dy) that its input gradient may hold.
struct SimdBase {
  static constexpr int kFactorRows = 8;  // of W at most
  static constexpr bool kByteTables = false;
  static constexpr int kExposed = 1;
  static constexpr int kTileSteps = 1;
  static constexpr bool kOwnOrder = false;  // whether there is an Order: see kernels_vector.h
};

// n elements as S loads them, and zeros behind.
template <typename S, typename T>
typename S::F load_padded(const T* p, int n) {
  T lanes[S::kLanes] = {};
  std::memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(T));
  return S::load(lanes);
}

}  // namespace
}  // namespace qkern::cpu
