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

// Sums of kRows rows of a tile; a structure for LaneTile's reason.
template <int kRows, int kRowStride>
struct PairTile {
  Simd::F low = Simd::zero(), high = Simd::zero();
  PairTile<kRows - 1, kRowStride> below;

  // One pair of steps: a[row][step] times the pairs of the panel's columns.
  __attribute__((always_inline)) void add(const BFloat16* a, __m512bh w0, __m512bh w1) {
    std::int32_t two;
    std::memcpy(&two, a, sizeof(two));
    const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
    low = _mm512_dpbf16_ps(low, w0, x);
    high = _mm512_dpbf16_ps(high, w1, x);
    below.add(a + kRowStride, w0, w1);
  }
  __attribute__((always_inline)) void store(float* c, bool accumulate) const {
    Simd::storeu(c, accumulate ? Simd::add(Simd::loadu(c), low) : low);
    Simd::storeu(c + kLanes, accumulate ? Simd::add(Simd::loadu(c + kLanes), high) : high);
    below.store(c + kTileCols, accumulate);
  }
};
template <int kRowStride>
struct PairTile<0, kRowStride> {
  void add(const BFloat16*, __m512bh, __m512bh) {}
  void store(float*, bool) const {}
};

// As multiply_tile in kernels_multiply.h, on pairs; depth is even.
template <int kRows, int kRowStride>
void multiply_pairs(const BFloat16* a, const BFloat16* panel, std::int64_t depth, float* c,
                    bool accumulate) {
  PairTile<kRows, kRowStride> tile;
  for (std::int64_t k = 0; k < depth; k += 2) {
    const __m512i w0 = _mm512_loadu_si512(panel + k * kTileCols);
    const __m512i w1 = _mm512_loadu_si512(panel + k * kTileCols + kTileCols);
    tile.add(a + k, reinterpret_cast<__m512bh>(w0), reinterpret_cast<__m512bh>(w1));
  }
  tile.store(c, accumulate);
}

using MultiplyPairsFn = void (*)(const BFloat16*, const BFloat16*, std::int64_t, float*, bool);

struct BFloat16Engine : PairEngine {
  // A panel is 16 KiB: with what 14 rows of x take and their sums, 26 KiB of Zen 4's 32.
  static constexpr std::int64_t kDepth = 256;
  static constexpr std::int64_t kStripRows = Simd::kTileRows;
  static constexpr int kRowMultiple = 1;
  static constexpr int kDepthMultiple = 2;
  // The scratch holds tiles of 512 rows by 352 columns.
  static constexpr std::int64_t kMaxTileRows = 512;
  static constexpr std::int64_t kMaxTileCols = 352;
  // Cycles of Zen 4 for 32 weights and M rows. Forward: decoding a panel takes about 6 (five
  // shuffles, four of other kinds, a store) and its products M; kernels_vector.h takes 2 M for the
  // products and 1 to decode. Input gradient: 5 and M against 2 M, plus stores of sums.
  static constexpr int kVectorRows = 5;
  static constexpr int kVectorRowsDx = 4;
  // Rows of the copy of x are an odd number of cache lines apart: they spread over the cache's
  // sets.
  static constexpr int kRowStride = kDepth + 32;

  MultiplyPairsFn multiply[kStripRows + 1] = {};

  BFloat16Engine() { fill<kStripRows>(); }

  // A copy costs a load and a store for 32 elements, which then meet a tile's hundreds of columns;
  // it lies at a stride that the instructions hold.
  static bool takes_in_place(const BFloat16*, std::int64_t, std::int64_t) { return false; }
  static constexpr std::int64_t row_stride(std::int64_t) { return kRowStride; }

  void run_strip(const Element* a, std::int64_t, std::int64_t rows, const Element* panel,
                 std::int64_t depth, float* c, bool accumulate) const {
    multiply[rows](a, panel, depth, c, accumulate);
  }

 private:
  template <int kRows>
  void fill() {
    multiply[kRows] = multiply_pairs<kRows, kRowStride>;
    if constexpr (kRows > 1) fill<kRows - 1>();
  }
};

}  // namespace
}  // namespace qkern::cpu
