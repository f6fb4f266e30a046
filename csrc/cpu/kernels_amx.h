// The tiled matmuls' engine for bfloat16 on AMX: 16 x 32 by 32 x 16 tile products with float32
// sums. Weights are rounded to bfloat16, as "dequantise to x's dtype, then multiply" would. The
// instructions take subnormal inputs for zeros.
#pragma once

#include <immintrin.h>

#include "simd_avx512.h"

#include "kernels.h"

namespace qkern::cpu {
namespace {

struct AmxEngine {
  using Element = BFloat16;
  static constexpr std::int64_t kDepth = 576;  // such a panel leaves the L1 cache room for x
  static constexpr int kInterleave = 2;        // a tile's row holds pairs of steps
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
  static Element element(float value) { return from_float<BFloat16>(value); }

  // Two steps of 16 columns, interleaved to pairs.
  static void store_steps(Element* panel, Simd::F first, Simd::F second) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(order, both));
  }
  // Two rows of W: their 16 scaled codes each are one table of 32, which one instruction looks up
  // for 16 columns of both.
  static void decode_rows(const std::uint8_t* first, const std::uint8_t* second, Simd::Lut lut,
                          float first_scale, float second_scale, Element* to) {
    const __m512i table = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(Simd::scale_lut(lut, second_scale), Simd::scale_lut(lut, first_scale)));
    const __m512i bytes = _mm512_castsi256_si512(
        _mm256_inserti128_si256(_mm256_castsi128_si256(load16(first)), load16(second), 1));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(row_codes<0>(bytes), table));
    _mm512_storeu_si512(to + 2 * kTile, _mm512_permutexvar_epi16(row_codes<8>(bytes), table));
  }
  static void copy_row(const BFloat16* from, std::int64_t n, Element* to) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(Element));
  }

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
  static __m128i load16(const std::uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }

  // Indexes into decode_rows' table, pairs (first row, second row) by column, from the 16 bytes of
  // each row, of which 8 beginning with kByte count. Columns go from a byte's high nibble to its
  // low one.
  template <int kByte>
  static __m512i row_codes(__m512i bytes) {
    alignas(64) static constexpr auto kOrder = [] {
      struct {
        std::uint8_t at[64] = {};
      } order;
      for (int i = 0; i < 32; ++i) {
        order.at[2 * i] = static_cast<std::uint8_t>(kByte + i / 4 + i % 2 * 16);
      }
      return order;
    }();
    const __m512i spread = _mm512_permutexvar_epi8(_mm512_load_si512(kOrder.at), bytes);
    const __m512i shifts = _mm512_set1_epi64(0x0000'0000'0004'0004);
    const __m512i nibble = _mm512_set1_epi32(0x000f'000f);
    const __m512i row = _mm512_set1_epi32(0x0010'0000);
    constexpr int kAndOr = 0xea;  // (a & b) | c
    return _mm512_ternarylogic_epi32(_mm512_srlv_epi16(spread, shifts), nibble, row, kAndOr);
  }

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
