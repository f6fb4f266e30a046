// The tiled matmuls' engines on AMX: 16 x 32 by 32 x 16 tile products of bfloat16 with float32
// sums, for bfloat16 and, by three products for one, for float16.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "kernels_pairs.h"

namespace qkern::cpu {
namespace {

template <typename Pairs>
struct AmxEngineOf : Pairs {
  using Element = typename Pairs::Element;
  using Pairs::kInterleave;
  using Pairs::kParts;
  static_assert(kParts <= 2, "loops are written out");

  static constexpr std::int64_t kDepth = 576 / kParts;  // a panel leaves the L1 cache room for x
  static constexpr std::int64_t kStripRows = 32;
  static constexpr int kRowMultiple = 32;
  static constexpr int kDepthMultiple = 32;
  static constexpr std::int64_t kMaxTileRows = 512;
  static constexpr std::int64_t kMaxTileCols = 384;
  // From more rows on, tiles of 16 that are half empty are faster than vectors. Three products take
  // 64 cycles longer for 1024 weights, and vectors 32 a row.
  static constexpr int kVectorRows = kParts == 1 ? 7 : 8;
  static constexpr int kVectorRowsDx = kParts == 1 ? 5 : 8;

  static constexpr int kTile = 16;  // rows and float32 columns of a tile
  static_assert(kTileCols == 2 * kTile, "a panel is two tiles wide");

  // All eight tiles are 16 rows of 64 bytes. Released at the end of the parallel region, so that
  // other libraries' kernels find the unit as they expect it.
  AmxEngineOf() {
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
  ~AmxEngineOf() { _tile_release(); }
  AmxEngineOf(const AmxEngineOf&) = delete;
  AmxEngineOf& operator=(const AmxEngineOf&) = delete;

  // Nothing may lie between the last step and the next row, and rows a page apart would all go to
  // the same cache sets.
  template <typename T>
  static bool takes_in_place(const T*, std::int64_t row_stride, std::int64_t depth) {
    return std::is_same_v<T, Element> && depth % kDepthMultiple == 0 &&
           row_stride * sizeof(Element) % 4096 != 0;
  }
  static constexpr std::int64_t row_stride(std::int64_t slice) { return kParts * slice + 32; }

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
    constexpr int kStrideB = kParts * kTileCols * kInterleave * sizeof(Element);
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
      const Element* x = a + k * kParts;
      const Element* w = panel + k * kParts * kTileCols;
      load_columns(w, kStrideB);
      if (kParts == 2) {
        add_rows<kRowTiles>(x + kDepthMultiple, a_stride, stride);
      }
      add_rows<kRowTiles>(x, a_stride, stride);
      if (kParts == 2) {
        load_columns(w + kInterleave * kTileCols, kStrideB);
        add_products<kRowTiles>();
      }
    }
    _tile_stored(0, c, kStrideC);
    _tile_stored(1, c + kTile, kStrideC);
    if (kRowTiles == 2) {
      _tile_stored(2, lower, kStrideC);
      _tile_stored(3, lower + kTile, kStrideC);
    }
  }

  __attribute__((always_inline)) static void load_columns(const Element* w, int stride) {
    _tile_loadd(6, w, stride);
    _tile_loadd(7, w + kTile * kInterleave, stride);
  }
  template <int kRowTiles>
  __attribute__((always_inline)) static void add_rows(const Element* x, std::int64_t x_stride,
                                                      std::int64_t stride) {
    _tile_loadd(4, x, stride);
    if (kRowTiles == 2) _tile_loadd(5, x + kTile * x_stride, stride);
    add_products<kRowTiles>();
  }
  template <int kRowTiles>
  __attribute__((always_inline)) static void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kRowTiles == 2) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

using AmxEngine = AmxEngineOf<PairEngine>;
using SplitAmxEngine = AmxEngineOf<SplitPairEngine>;

}  // namespace
}  // namespace qkern::cpu
