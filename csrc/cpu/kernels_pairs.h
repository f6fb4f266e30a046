// Panels of bfloat16 pairs, [step / 2][kTileCols][2], as the dot products of AVX512-BF16 and of AMX
// read them. Weights are rounded to bfloat16, as "dequantise to x's dtype, then multiply" would.
// The instructions take subnormal inputs for zeros.
#pragma once

#include <immintrin.h>

#include "simd_avx512.h"

#include "kernels.h"

namespace qkern::cpu {
namespace {

// What the engines for bfloat16 share.
struct PairEngine {
  using Element = BFloat16;
  static constexpr int kInterleave = 2;

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
    _mm512_storeu_si512(to + kTileCols, _mm512_permutexvar_epi16(row_codes<8>(bytes), table));
  }
  static void copy_row(const BFloat16* from, std::int64_t n, Element* to) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(Element));
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
};

}  // namespace
}  // namespace qkern::cpu
