// The inner loops of the tiled matmuls.
#pragma once

#include <cstdint>

#include "kernels_panel.h"
#include "simd.h"

namespace qkern::cpu {
namespace {

// One step in float32: an element of x by the weights of kTileCols columns.
struct FloatStep {
  using Element = float;
  using Weights = Simd::F;
  static constexpr int kSteps = 1;

  static Weights load(const float* panel) { return Simd::loadu(panel); }
  static Weights broadcast(const float* a) { return Simd::set1(*a); }
  static Simd::F multiply_add(Weights x, Weights w, Simd::F sum) { return Simd::fma(x, w, sum); }
};

// A row stride that is known only at run time.
constexpr int kAnyStride = 0;

template <int kRowStride>
constexpr std::int64_t known_stride(std::int64_t stride) {
  return kRowStride == kAnyStride ? stride : kRowStride;
}

// Sums of kRows rows of a tile. A structure, because an array that loops index is kept in memory.
template <int kRows, typename Step>
struct BroadcastTile {
  Simd::F low = Simd::zero(), high = Simd::zero();
  BroadcastTile<kRows - 1, Step> below;

  // a[row][step] times the weights of that step.
  __attribute__((always_inline)) void add(const typename Step::Element* a, std::int64_t stride,
                                          typename Step::Weights w0, typename Step::Weights w1) {
    const typename Step::Weights x = Step::broadcast(a);
    low = Step::multiply_add(x, w0, low);
    high = Step::multiply_add(x, w1, high);
    below.add(a + stride, stride, w0, w1);
  }
  __attribute__((always_inline)) void store(float* c, bool accumulate) const {
    Simd::storeu(c, accumulate ? Simd::add(Simd::loadu(c), low) : low);
    Simd::storeu(c + kLanes, accumulate ? Simd::add(Simd::loadu(c + kLanes), high) : high);
    below.store(c + kTileCols, accumulate);
  }
};
template <typename Step>
struct BroadcastTile<0, Step> {
  void add(const typename Step::Element*, std::int64_t, typename Step::Weights,
           typename Step::Weights) {}
  void store(float*, bool) const {}
};

// c[kRows][kTileCols] = or += a[kRows][depth] * panel[depth][kTileCols]. Sums start anew in each
// panel: short chains of additions lose less than one chain over the whole contraction. The rows of
// a are kRowStride apart, or `stride`.
template <int kRows, int kRowStride, typename Step>
void multiply_tile(const typename Step::Element* a, std::int64_t stride,
                   const typename Step::Element* panel, std::int64_t depth, float* c,
                   bool accumulate) {
  BroadcastTile<kRows, Step> tile;
  for (std::int64_t k = 0; k < depth; k += Step::kSteps) {
    const typename Step::Element* w = panel + k * kTileCols;
    tile.add(a + k, known_stride<kRowStride>(stride), Step::load(w),
             Step::load(w + Step::kSteps * kLanes));
  }
  tile.store(c, accumulate);
}

// multiply_tile for a panel and a tile that are one register wide.
template <int kRows, int kRowStride>
void multiply_narrow_tile(const float* a, std::int64_t any_stride, const float* panel,
                          std::int64_t depth, float* c, bool accumulate) {
  const std::int64_t stride = known_stride<kRowStride>(any_stride);
  Simd::F sum[kRows];
  for (int i = 0; i < kRows; ++i) sum[i] = Simd::zero();
  for (std::int64_t k = 0; k < depth; ++k) {
    const Simd::F w = Simd::loadu(panel + k * kLanes);
    for (int i = 0; i < kRows; ++i) {
      sum[i] = Simd::fma(Simd::set1(a[i * stride + k]), w, sum[i]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    if (accumulate) sum[i] = Simd::add(Simd::loadu(c + i * kLanes), sum[i]);
    Simd::storeu(c + i * kLanes, sum[i]);
  }
}

// As BroadcastTile, for instruction sets that take x by lane.
template <int kRows, typename S>
struct LaneTile {
  using F = typename S::F;

  F low = S::zero(), high = S::zero();
  LaneTile<kRows - 1, S> below;

  // Four steps: a[row][step] times w[step].
  __attribute__((always_inline)) void add(const float* a, std::int64_t stride, const F (&w)[4][2]) {
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
    below.add(a + stride, stride, w);
  }
  __attribute__((always_inline)) void store(float* c, bool accumulate) const {
    S::storeu(c, accumulate ? S::add(S::loadu(c), low) : low);
    S::storeu(c + kLanes, accumulate ? S::add(S::loadu(c + kLanes), high) : high);
    below.store(c + kTileCols, accumulate);
  }
};
template <typename S>
struct LaneTile<0, S> {
  void add(const float*, std::int64_t, const typename S::F (&)[4][2]) {}
  void store(float*, bool) const {}
};

// multiply_tile for such an instruction set; depth is a multiple of four.
template <int kRows, int kRowStride, typename S>
void multiply_lane_tile(const float* a, std::int64_t stride, const float* panel, std::int64_t depth,
                        float* c, bool accumulate) {
  LaneTile<kRows, S> tile;
  for (std::int64_t k = 0; k < depth; k += 4) {
    const float* p = panel + k * kTileCols;
    const typename S::F w[4][2] = {
        {S::loadu(p), S::loadu(p + kLanes)},
        {S::loadu(p + kTileCols), S::loadu(p + kTileCols + kLanes)},
        {S::loadu(p + 2 * kTileCols), S::loadu(p + 2 * kTileCols + kLanes)},
        {S::loadu(p + 3 * kTileCols), S::loadu(p + 3 * kTileCols + kLanes)}};
    tile.add(a + k, known_stride<kRowStride>(stride), w);
  }
  tile.store(c, accumulate);
}

template <typename Element>
using MultiplyFn = void (*)(const Element* a, std::int64_t stride, const Element* panel,
                            std::int64_t depth, float* c, bool accumulate);

// These fill table[1] to table[kRows].
template <int kRows, int kRowStride, typename Step>
void fill_by_broadcast(MultiplyFn<typename Step::Element>* table) {
  table[kRows] = multiply_tile<kRows, kRowStride, Step>;
  if constexpr (kRows > 1) fill_by_broadcast<kRows - 1, kRowStride, Step>(table);
}

template <int kRows, int kRowStride, typename Step, typename S = Simd>
void fill_multiply(MultiplyFn<typename Step::Element>* table) {
  if constexpr (S::kTileSteps > 1) {
    table[kRows] = multiply_lane_tile<kRows, kRowStride, S>;
  } else {
    table[kRows] = multiply_tile<kRows, kRowStride, Step>;
  }
  if constexpr (kRows > 1) fill_multiply<kRows - 1, kRowStride, Step, S>(table);
}

template <int kRows, int kRowStride>
void fill_narrow(MultiplyFn<float>* table) {
  table[kRows] = multiply_narrow_tile<kRows, kRowStride>;
  if constexpr (kRows > 1) fill_narrow<kRows - 1, kRowStride>(table);
}

}  // namespace
}  // namespace qkern::cpu
