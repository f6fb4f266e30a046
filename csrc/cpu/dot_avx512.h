// Dot products of 16-bit integers on AVX-512, for kernels_dot.h.
#pragma once

#include "simd_avx512.h"

#define QKERN_HAS_DOT 1

namespace qkern::cpu {
namespace {

// See dot_avx2.h. Here 16-bit words are looked up, of which each of four shifts exposes one code:
// a lane takes eight neighbours. With VNNI a sum of products is one instruction.
struct Dot {
  static constexpr int kRegisters = 4;
  // Rows of W side by side: as many as leave room for the decoded registers and all sums.
  static constexpr int streams(int rows) { return rows == 1 ? 4 : rows == 2 ? 3 : 2; }

  // Which of its lane's eight elements a pair of register i holds: a 16-bit word has its codes 1,
  // 0, 3, 2 from the lowest bits up.
  static constexpr int low_element(int i) { return i ^ 1; }
  static constexpr int high_element(int i) { return 4 + (i ^ 1); }
  // Element j of each lane's eight.
  static Simd::F gather(const float* chunk, int j) { return Simd::gather_stride8(chunk + j); }

  static void decode(const Simd::Lut16& lut, Simd::I words, Simd::I (&w)[kRegisters]) {
    w[0] = _mm512_permutexvar_epi16(words, lut);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), lut);
    w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), lut);
    w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), lut);
  }

  // Sums of two products, 32 bits each.
#if defined(__AVX512VNNI__)
  static Simd::I multiply(Simd::I a, Simd::I b) {
    return multiply_add(_mm512_setzero_si512(), a, b);
  }
  static Simd::I multiply_add(Simd::I sum, Simd::I a, Simd::I b) {
    return _mm512_dpwssd_epi32(sum, a, b);
  }
#else
  static Simd::I multiply(Simd::I a, Simd::I b) { return _mm512_madd_epi16(a, b); }
  static Simd::I multiply_add(Simd::I sum, Simd::I a, Simd::I b) {
    return _mm512_add_epi32(sum, multiply(a, b));
  }
#endif
  static Simd::I load(const float* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, Simd::I v) { _mm512_storeu_si512(p, v); }
  static Simd::F to_float(Simd::I v) { return _mm512_cvtepi32_ps(v); }
  static Simd::I to_integer(Simd::F v) { return _mm512_cvtps_epi32(v); }
  // 32-bit integers that fit 16 bits as pairs.
  static Simd::I pairs(Simd::I low, Simd::I high) {
    return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)),
                           _mm512_slli_epi32(high, 16));
  }

  static Simd::F larger_magnitude(Simd::F a, Simd::F b) {
    return _mm512_max_ps(a, _mm512_abs_ps(b));
  }
  // a / b where key > least, else 0.
  static Simd::F divide_where(Simd::F key, float least, Simd::F a, Simd::F b) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(key, Simd::set1(least), _CMP_GT_OQ), a, b);
  }
  static int count_nonzero(Simd::F v) {
    return __builtin_popcount(_mm512_cmp_ps_mask(v, Simd::zero(), _CMP_NEQ_UQ));
  }
  static int count_at_least(Simd::F v, Simd::F least) {
    return __builtin_popcount(_mm512_cmp_ps_mask(v, least, _CMP_GE_OQ));
  }
};

}  // namespace
}  // namespace qkern::cpu
