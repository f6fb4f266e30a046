// Panels of bfloat16 pairs, [step / 2][kParts][kTileCols][2], as the dot products of AVX512-BF16
// and of AMX read them. Weights are rounded to bfloat16, as "dequantise to x's dtype, then
// multiply" would, or are the sums of two. The instructions take subnormal inputs for zeros.
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
  static constexpr int kParts = 1;

  static Element element(float value, int) { return from_float<BFloat16>(value); }

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
    const __m512i bytes = both_rows(first, second);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(row_codes<0>(bytes), table));
    _mm512_storeu_si512(to + kTileCols, _mm512_permutexvar_epi16(row_codes<8>(bytes), table));
  }
  static void copy_row(const BFloat16* from, std::int64_t n, std::int64_t padded, Element* to) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(Element));
    std::memset(to + n, 0, static_cast<std::size_t>(padded - n) * sizeof(Element));
  }

 protected:
  // 16 bytes of each row.
  static __m512i both_rows(const std::uint8_t* first, const std::uint8_t* second) {
    return _mm512_castsi256_si512(
        _mm256_inserti128_si256(_mm256_castsi128_si256(load16(first)), load16(second), 1));
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

 private:
  static __m128i load16(const std::uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
};

// float16 by products of bfloat16. A number is the sum of itself rounded to bfloat16, the first
// part, and of the rest, rounded likewise: exactly so for x, and for weights but for 2^-18 of them,
// where rounding them to float16 takes up to 2^-12. A product is those of the parts but for that of
// both second ones, which is 2^-18 of it at most.
struct SplitPairEngine : PairEngine {
  static constexpr int kParts = 2;
  // A row of x is [step / kRun][kParts][kRun].
  static constexpr std::int64_t kRun = 32;

  static Element element(float value, int part) {
    const Element first = from_float<BFloat16>(value);
    return part == 0 ? first : from_float<BFloat16>(value - to_float(first));
  }
  static void store_steps(Element* panel, Simd::F first, Simd::F second) {
    PairEngine::store_steps(panel, first, second);
    const __m512i pairs = _mm512_loadu_si512(panel);
    PairEngine::store_steps(panel + kInterleave * kTileCols, _mm512_sub_ps(first, low(pairs)),
                            _mm512_sub_ps(second, high(pairs)));
  }
  static void decode_rows(const std::uint8_t* first, const std::uint8_t* second, Simd::Lut lut,
                          float first_scale, float second_scale, Element* to) {
    const Simd::F value[2] = {Simd::scale_lut(lut, first_scale),
                              Simd::scale_lut(lut, second_scale)};
    const __m512i table = rounded(value[0], value[1]);
    const Simd::F rest[2] = {_mm512_sub_ps(value[0], widened(_mm512_castsi512_si256(table))),
                             _mm512_sub_ps(value[1], widened(_mm512_extracti64x4_epi64(table, 1)))};
    const __m512i tables[kParts] = {table, rounded(rest[0], rest[1])};
    const __m512i bytes = both_rows(first, second);
    const __m512i codes[2] = {row_codes<0>(bytes), row_codes<8>(bytes)};
    for (int part = 0; part < kParts; ++part) {
      Element* at = to + part * kInterleave * kTileCols;
      _mm512_storeu_si512(at, _mm512_permutexvar_epi16(codes[0], tables[part]));
      _mm512_storeu_si512(at + kTileCols, _mm512_permutexvar_epi16(codes[1], tables[part]));
    }
  }
  static void copy_row(const Float16* from, std::int64_t n, std::int64_t padded, Element* to) {
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      const Simd::F x = i + kLanes <= n ? Simd::load(from + i)
                        : i < n         ? Simd::load_partial(from + i, static_cast<int>(n - i))
                                        : Simd::zero();
      // Infinities and NaNs are second parts: these meet first parts of weights alone, so that a
      // second part of zero makes no NaN of an infinity.
      const __mmask16 finite =
          _mm512_cmp_ps_mask(_mm512_abs_ps(x), Simd::set1(__builtin_inff()), _CMP_LT_OQ);
      Element* at = to + i / kRun * kParts * kRun + i % kRun;
      Simd::store(at, _mm512_maskz_mov_ps(finite, x));
      Simd::store(at + kRun, _mm512_sub_ps(x, Simd::load(at)));
    }
  }

 private:
  // Of pairs, the elements in the lower halves of lanes, and those in the upper ones.
  static Simd::F low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static Simd::F high(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
  // The first's lanes, then the second's, in bfloat16.
  static __m512i rounded(Simd::F first, Simd::F second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  }
  static Simd::F widened(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
  }
};

}  // namespace
}  // namespace qkern::cpu
