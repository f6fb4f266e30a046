// The tiled matmuls' engine for bfloat16 on AVX512-BF16: dot products of pairs, with float32 sums.
//
// Zen 4 starts one such product of 512 bits (32 multiply-adds) a cycle, twice float32's rate, and
// has its sum some six cycles later. So a strip is 14 rows by two registers, as float32's: 28 sums
// hide the latency from three rows on, and each pair of steps is 28 products beside 16 loads, which
// have a port of their own. An element of x is one load for 32 columns: with a memory operand for
// each product there would be 30 loads, more than products.
//
// float16 stays with float32: its 11 bits are two bfloat16 exactly, but weights need two as well to
// be as exact as rounded to float16. That is three products for one, at twice the rate.
#pragma once

#include <immintrin.h>

#include "kernels_pairs.h"

namespace qkern::cpu {
namespace {

// Two steps: a pair of x by the pairs of kTileCols columns.
struct PairStep {
  using Element = BFloat16;
  using Weights = __m512bh;
  static constexpr int kSteps = 2;

  static Weights load(const Element* panel) {
    return reinterpret_cast<Weights>(_mm512_loadu_si512(panel));
  }
  static Weights broadcast(const Element* a) {
    std::int32_t two;
    std::memcpy(&two, a, sizeof(two));
    return reinterpret_cast<Weights>(_mm512_set1_epi32(two));
  }
  static Simd::F multiply_add(Weights x, Weights w, Simd::F sum) {
    return _mm512_dpbf16_ps(sum, w, x);
  }
};

struct BFloat16Engine : PairEngine {
  // A panel is 16 KiB: with what 14 rows of x take and their sums, 26 KiB of Zen 4's 32.
  static constexpr std::int64_t kDepth = 256;
  static constexpr std::int64_t kStripRows = Simd::kTileRows;
  static constexpr int kRowMultiple = 1;
  static constexpr int kDepthMultiple = PairStep::kSteps;
  // The scratch holds tiles of 512 rows by 352 columns.
  static constexpr std::int64_t kMaxTileRows = 512;
  static constexpr std::int64_t kMaxTileCols = 352;
  // Counted cycles of Zen 4 for 32 weights and M rows. Forward: about 5 to decode a panel (five
  // shuffles, four operations of other kinds, a store) and M products; kernels_vector.h takes 1 and
  // 2 M. Input gradient: 4 and M against 2 M and stores of sums. A tile has some work of its own.
  static constexpr int kVectorRows = 5;
  static constexpr int kVectorRowsDx = 4;
  // Rows of the copy of x are an odd number of cache lines apart: they spread over the cache's
  // sets.
  static constexpr int kRowStride = kDepth + 32;

  MultiplyFn<Element> multiply[kStripRows + 1] = {};

  BFloat16Engine() { fill_multiply<kStripRows, kRowStride, PairStep>(multiply); }

  // A copy costs a load and a store for 32 elements, which then meet a tile's hundreds of columns;
  // it lies at a stride that the instructions hold.
  static bool takes_in_place(const BFloat16*, std::int64_t, std::int64_t) { return false; }
  static constexpr std::int64_t row_stride(std::int64_t) { return kRowStride; }

  void run_strip(const Element* a, std::int64_t stride, std::int64_t rows, const Element* panel,
                 std::int64_t depth, float* c, bool accumulate) const {
    multiply[rows](a, stride, panel, depth, c, accumulate);
  }
};

}  // namespace
}  // namespace qkern::cpu
