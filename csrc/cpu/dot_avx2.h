// Dot products of 16-bit integers on AVX2, for kernels_dot.h.
#pragma once

#include "simd_avx2.h"

#define QKERN_HAS_DOT 1

namespace qkern::cpu {
namespace {

// A register of packed words is decoded to four registers of 16-bit weights, whose lanes are pairs.
// A lane's four pairs are eight elements that share a block. Here bytes are looked up, 32 codes an
// instruction, so a lane takes two runs of four elements, 16 apart; registers 0 and 1 are the low
// codes of the bytes.
struct Dot {
  static constexpr int kRegisters = 4;
  // Rows of W side by side. Rows of x beyond the first leave registers for one.
  static constexpr int streams(int rows) { return rows == 1 ? 2 : 1; }

  // Which of its lane's eight elements a pair of register i holds.
  static constexpr int low_element(int i) { return i % 2 * 4 + (i < 2 ? 1 : 0); }
  static constexpr int high_element(int i) { return low_element(i) + 2; }
  // Element j of each lane's eight.
  static Simd::F gather(const float* chunk, int j) {
    const float* from = chunk + j % 4 + j / 4 * 16;
    return _mm256_i32gather_ps(from, _mm256_setr_epi32(0, 4, 8, 12, 32, 36, 40, 44), 4);
  }

  static void decode(const Simd::Lut16& lut, Simd::I words, Simd::I (&w)[kRegisters]) {
    const Simd::I mask = _mm256_set1_epi8(15);
    const Simd::I codes[2] = {_mm256_and_si256(words, mask),
                              _mm256_and_si256(_mm256_srli_epi16(words, 4), mask)};
    for (int i = 0; i < 2; ++i) {
      const Simd::I low = _mm256_shuffle_epi8(lut.low, codes[i]);
      const Simd::I high = _mm256_shuffle_epi8(lut.high, codes[i]);
      w[2 * i] = _mm256_unpacklo_epi8(low, high);
      w[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
    }
  }

  // Sums of two products, 32 bits each.
  static Simd::I multiply(Simd::I a, Simd::I b) { return _mm256_madd_epi16(a, b); }
  static Simd::I multiply_add(Simd::I sum, Simd::I a, Simd::I b) {
    return _mm256_add_epi32(sum, multiply(a, b));
  }
  static Simd::I load(const float* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Simd::I*>(p));
  }
  static void store(float* p, Simd::I v) { _mm256_storeu_si256(reinterpret_cast<Simd::I*>(p), v); }
  static Simd::F to_float(Simd::I v) { return _mm256_cvtepi32_ps(v); }
  static Simd::I to_integer(Simd::F v) { return _mm256_cvtps_epi32(v); }
  // 32-bit integers that fit 16 bits as pairs.
  static Simd::I pairs(Simd::I low, Simd::I high) {
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
  }

  static Simd::F larger_magnitude(Simd::F a, Simd::F b) {
    return _mm256_max_ps(a, _mm256_andnot_ps(Simd::set1(-0.0f), b));
  }
  // a / b where key > least, else 0.
  static Simd::F divide_where(Simd::F key, float least, Simd::F a, Simd::F b) {
    const Simd::F counts = _mm256_cmp_ps(key, Simd::set1(least), _CMP_GT_OQ);
    return _mm256_and_ps(_mm256_div_ps(a, b), counts);
  }
  static int count_nonzero(Simd::F v) {
    return __builtin_popcount(
        static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, Simd::zero(), _CMP_NEQ_UQ))));
  }
  static int count_at_least(Simd::F v, Simd::F least) {
    return __builtin_popcount(
        static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ))));
  }
};

}  // namespace
}  // namespace qkern::cpu
