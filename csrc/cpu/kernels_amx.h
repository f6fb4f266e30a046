// The tiled matmuls' engine for bfloat16 on AMX: 16 x 32 by 32 x 16 tile products with float32
// sums.
#pragma once

#include <immintrin.h>

#include "kernels_pairs.h"

namespace qkern::cpu {
namespace {

struct AmxEngine : PairEngine {
  static constexpr std::int64_t kDepth = 576;  // such a panel leaves the L1 cache room for x
  static constexpr std::int64_t kStripRows = 32;
  static constexpr int kRowMultiple = 32;
  static constexpr int kDepthMultiple = 32;
  static constexpr std::int64_t kMaxTileRows = 512;
  static constexpr std::int64_t kMaxTileCols = 384;
  // From more rows on, tiles of 16 that are half empty are faster than vectors.
  static constexpr int kVectorRows = 7;
  static constexpr int kVectorRowsDx = 5;

  static constexpr int kTile = 16;  // rows and float32 columns of a tile
  static_assert(kTileCols == 2 * kTile, "a panel is two tiles wide");

  // All eight tiles are 16 rows of 64 bytes. Released at the end of the parallel region, so that
  // other libraries' kernels find the unit as they expect it.
  AmxEngine() {
    alignas(64) struct {
      std::uint8_t palette = 1;
      std::uint8_t start_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64, "the layout that the instruction reads");
    // GCC before 14 believes that the instruction reads 8 bytes and may drop the other stores.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~AmxEngine() { _tile_release(); }
  AmxEngine(const AmxEngine&) = delete;
  AmxEngine& operator=(const AmxEngine&) = delete;

  // Nothing may lie between the last step and the next row, and rows a page apart would all go to
  // the same cache sets.
  static bool takes_in_place(const BFloat16*, std::int64_t row_stride, std::int64_t depth) {
    return depth % kDepthMultiple == 0 && row_stride * sizeof(Element) % 4096 != 0;
  }
  static constexpr std::int64_t row_stride(std::int64_t slice) { return slice + 32; }

  // A strip of x by a panel, for up to 32 rows: c[32][kTileCols] = or += a * panel.
  static void run_strip(const Element* a, std::int64_t a_stride, std::int64_t rows,
                        const Element* panel, std::int64_t depth, float* c, bool accumulate) {
    if (rows > kTile) {
      multiply<2>(a, a_stride, panel, depth, c, accumulate);
    } else {
      multiply<1>(a, a_stride, panel, depth, c, accumulate);
    }
  }

 private:
  // Tile numbers are part of the instructions: 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 columns
  // of W.
  template <int kRowTiles>
  static void multiply(const Element* a, std::int64_t a_stride, const Element* panel,
                       std::int64_t depth, float* c, bool accumulate) {
    constexpr int kStrideB = kTileCols * kInterleave * sizeof(Element);
    constexpr int kStrideC = kTileCols * sizeof(float);
    const std::int64_t stride = a_stride * static_cast<std::int64_t>(sizeof(Element));
    float* lower = c + kTile * kTileCols;
    // GCC also misses that these loads read the scratch.
    __asm__ volatile("" : : : "memory");
    if (accumulate) {
      _tile_loadd(0, c, kStrideC);
      _tile_loadd(1, c + kTile, kStrideC);
      if (kRowTiles == 2) {
        _tile_loadd(2, lower, kStrideC);
        _tile_loadd(3, lower + kTile, kStrideC);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (std::int64_t k = 0; k < depth; k += kDepthMultiple) {
      const Element* b = panel + k * kTileCols;
      _tile_loadd(6, b, kStrideB);
      _tile_loadd(7, b + kTile * kInterleave, kStrideB);
      _tile_loadd(4, a + k, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (kRowTiles == 2) {
        _tile_loadd(5, a + kTile * a_stride + k, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, kStrideC);
    _tile_stored(1, c + kTile, kStrideC);
    if (kRowTiles == 2) {
      _tile_stored(2, lower, kStrideC);
      _tile_stored(3, lower + kTile, kStrideC);
    }
  }
};

}  // namespace
}  // namespace qkern::cpu
