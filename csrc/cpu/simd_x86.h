// What AVX2 and AVX-512 share.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qkern::cpu {
namespace {

// The largest of 16 unsigned words.
inline std::uint16_t largest_word(__m256i v) {
  const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  // The instruction finds the smallest.
  const __m128i ones = _mm_set1_epi32(-1);
  const int least = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, ones)));
  return static_cast<std::uint16_t>(~least);
}

}  // namespace
}  // namespace qkern::cpu
