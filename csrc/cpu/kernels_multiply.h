// The inner loops of the tiled matmuls in float32.
#pragma once

#include <cstdint>

#include "kernels_panel.h"
#include "simd.h"

namespace qkern::cpu {
namespace {

// c[kRows][kTileCols] = or += a[kRows][depth] * panel[depth][kTileCols]. Sums start anew in each
// panel: short chains of additions lose less than one chain over the whole contraction.
template <int kRows, int kRowStride>
void multiply_tile(const float* a, const float* panel, std::int64_t depth, float* c,
                   bool accumulate) {
  Simd::F sum[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = Simd::zero();
    sum[i][1] = Simd::zero();
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const Simd::F w0 = Simd::loadu(panel + k * kTileCols);
    const Simd::F w1 = Simd::loadu(panel + k * kTileCols + kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Simd::F x = Simd::set1(a[i * kRowStride + k]);
      sum[i][0] = Simd::fma(x, w0, sum[i][0]);
      sum[i][1] = Simd::fma(x, w1, sum[i][1]);
    }
  }
  if (accumulate) {
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] = Simd::add(Simd::loadu(c + i * kTileCols), sum[i][0]);
      sum[i][1] = Simd::add(Simd::loadu(c + i * kTileCols + kLanes), sum[i][1]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    Simd::storeu(c + i * kTileCols, sum[i][0]);
    Simd::storeu(c + i * kTileCols + kLanes, sum[i][1]);
  }
}

// multiply_tile for a panel and a tile that are one register wide.
template <int kRows, int kRowStride>
void multiply_narrow_tile(const float* a, const float* panel, std::int64_t depth, float* c,
                          bool accumulate) {
  Simd::F sum[kRows];
  for (int i = 0; i < kRows; ++i) sum[i] = Simd::zero();
  for (std::int64_t k = 0; k < depth; ++k) {
    const Simd::F w = Simd::loadu(panel + k * kLanes);
    for (int i = 0; i < kRows; ++i) {
      sum[i] = Simd::fma(Simd::set1(a[i * kRowStride + k]), w, sum[i]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    if (accumulate) sum[i] = Simd::add(Simd::loadu(c + i * kLanes), sum[i]);
    Simd::storeu(c + i * kLanes, sum[i]);
  }
}

// Sums of kRows rows of a tile, for instruction sets that take x by lane. A structure, because an
// array that loops index is kept in memory.
template <int kRows, int kRowStride, typename S>
struct LaneTile {
  using F = typename S::F;

  F low = S::zero(), high = S::zero();
  LaneTile<kRows - 1, kRowStride, S> below;

  // Four steps: a[row][step] times w[step].
  __attribute__((always_inline)) void add(const float* a, const F (&w)[4][2]) {
    static_assert(S::kTileSteps == 4, "a register holds four steps");
    const F x = S::loadu(a);
    low = S::template fma_lane<0>(w[0][0], x, low);
    high = S::template fma_lane<0>(w[0][1], x, high);
    low = S::template fma_lane<1>(w[1][0], x, low);
    high = S::template fma_lane<1>(w[1][1], x, high);
    low = S::template fma_lane<2>(w[2][0], x, low);
    high = S::template fma_lane<2>(w[2][1], x, high);
    low = S::template fma_lane<3>(w[3][0], x, low);
    high = S::template fma_lane<3>(w[3][1], x, high);
    below.add(a + kRowStride, w);
  }
  __attribute__((always_inline)) void store(float* c, bool accumulate) const {
    S::storeu(c, accumulate ? S::add(S::loadu(c), low) : low);
    S::storeu(c + kLanes, accumulate ? S::add(S::loadu(c + kLanes), high) : high);
    below.store(c + kTileCols, accumulate);
  }
};
template <int kRowStride, typename S>
struct LaneTile<0, kRowStride, S> {
  void add(const float*, const typename S::F (&)[4][2]) {}
  void store(float*, bool) const {}
};

// multiply_tile for such an instruction set; depth is a multiple of four.
template <int kRows, int kRowStride, typename S>
void multiply_lane_tile(const float* a, const float* panel, std::int64_t depth, float* c,
                        bool accumulate) {
  LaneTile<kRows, kRowStride, S> tile;
  for (std::int64_t k = 0; k < depth; k += 4) {
    const float* p = panel + k * kTileCols;
    const typename S::F w[4][2] = {
        {S::loadu(p), S::loadu(p + kLanes)},
        {S::loadu(p + kTileCols), S::loadu(p + kTileCols + kLanes)},
        {S::loadu(p + 2 * kTileCols), S::loadu(p + 2 * kTileCols + kLanes)},
        {S::loadu(p + 3 * kTileCols), S::loadu(p + 3 * kTileCols + kLanes)}};
    tile.add(a + k, w);
  }
  tile.store(c, accumulate);
}

using MultiplyFn = void (*)(const float*, const float*, std::int64_t, float*, bool);

template <int kRows, int kRowStride, typename S = Simd>
struct MultiplyTable {
  static void fill(MultiplyFn* table) {
    if constexpr (S::kTileSteps > 1) {
      table[kRows] = multiply_lane_tile<kRows, kRowStride, S>;
    } else {
      table[kRows] = multiply_tile<kRows, kRowStride>;
    }
    MultiplyTable<kRows - 1, kRowStride, S>::fill(table);
  }
};
template <int kRowStride, typename S>
struct MultiplyTable<0, kRowStride, S> {
  static void fill(MultiplyFn*) {}
};

template <int kRows, int kRowStride>
struct NarrowTable {
  static void fill(MultiplyFn* table) {
    table[kRows] = multiply_narrow_tile<kRows, kRowStride>;
    NarrowTable<kRows - 1, kRowStride>::fill(table);
  }
};
template <int kRowStride>
struct NarrowTable<0, kRowStride> {
  static void fill(MultiplyFn*) {}
};

}  // namespace
}  // namespace qkern::cpu
