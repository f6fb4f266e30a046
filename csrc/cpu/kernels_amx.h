// The tiled matmuls' engine for bfloat16 on AMX: 16 x 32 by 32 x 16 tile products with float32
// sums. Weights are rounded to bfloat16, as "dequantise to x's dtype, then multiply" would. The
// instructions take subnormal inputs for zeros. Included after kernels.h.
#pragma once

#include <immintrin.h>

namespace qkern::cpu {
namespace {

struct AmxEngine {
  using Element = BFloat16;
  static constexpr std::int64_t kDepth = 512;
  static constexpr int kInterleave = 2;  // a tile's row holds pairs of steps
  static constexpr int kRowMultiple = 32;
  static constexpr int kDepthMultiple = 32;
  static constexpr int kRowStride = kDepth + 32;

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

  static Element element(float value) { return from_float<BFloat16>(value); }

  // Two steps of 16 columns, interleaved to pairs.
  static void store_steps(Element* panel, Simd::F first, Simd::F second) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(order, both));
  }
  static void copy_row(const BFloat16* from, std::int64_t n, Element* to) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(Element));
  }

  void run(const Element* a, std::int64_t rows, const Element* panels, std::int64_t cols,
           std::int64_t depth, float* c, std::int64_t c_stride) const {
    for (std::int64_t n = 0; n < cols; n += kTileCols) {
      for (std::int64_t m = 0; m < rows; m += 2 * kTile) {
        const Element* panel = panels + n * kDepth;
        float* to = c + m * c_stride + n;
        if (rows - m > kTile) {
          multiply<2>(a + m * kRowStride, panel, depth, to, c_stride);
        } else {
          multiply<1>(a + m * kRowStride, panel, depth, to, c_stride);
        }
      }
    }
  }

  // c[kRowTiles * 16][32] += a * panel. Tile numbers are part of the instructions: 0 to 3 are sums,
  // 4 and 5 rows of x, 6 and 7 columns of W.
  template <int kRowTiles>
  static void multiply(const Element* a, const Element* panel, std::int64_t depth, float* c,
                       std::int64_t c_stride) {
    constexpr int kStrideA = kRowStride * sizeof(Element);
    constexpr int kStrideB = kTileCols * kInterleave * sizeof(Element);
    const std::int64_t stride_c = c_stride * static_cast<std::int64_t>(sizeof(float));
    float* lower = c + kTile * c_stride;
    // Nor does it know that the loads below read what was stored to the scratch.
    __asm__ volatile("" : : : "memory");
    _tile_loadd(0, c, stride_c);
    _tile_loadd(1, c + kTile, stride_c);
    if (kRowTiles == 2) {
      _tile_loadd(2, lower, stride_c);
      _tile_loadd(3, lower + kTile, stride_c);
    }
    for (std::int64_t k = 0; k < depth; k += kDepthMultiple) {
      const Element* b = panel + k * kTileCols;
      _tile_loadd(6, b, kStrideB);
      _tile_loadd(7, b + kTile * kInterleave, kStrideB);
      _tile_loadd(4, a + k, kStrideA);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (kRowTiles == 2) {
        _tile_loadd(5, a + kTile * kRowStride + k, kStrideA);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, stride_c);
    _tile_stored(1, c + kTile, stride_c);
    if (kRowTiles == 2) {
      _tile_stored(2, lower, stride_c);
      _tile_stored(3, lower + kTile, stride_c);
    }
  }
};

constexpr KernelTable amx_kernels() {
  KernelTable table = kKernels;
  constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);
  table.name = "amx";
  table.linear_4bit[kBFloat16] = linear_4bit<AmxEngine, BFloat16>;
  table.linear_4bit_dx[kBFloat16] = linear_4bit_dx<AmxEngine, BFloat16>;
  return table;
}

constexpr KernelTable kAmxKernels = amx_kernels();

}  // namespace
}  // namespace qkern::cpu
