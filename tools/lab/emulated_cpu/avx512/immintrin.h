// Twins of AVX-512's intrinsics in plain C++, for processors that lack those instructions. This
// file stands in front of the compiler's <immintrin.h>: what that declares up to AVX2 comes from
// there, and of the rest exactly what csrc/cpu uses is here. Semantics: Intel's Software
// Developer's Manual, volume 2. intrinsics.cpp beside it compares the two on a processor that has
// both.
//
// Lanes that an instruction leaves undefined hold kUndefined, and memory that it reads is read in
// full even where the compiler finds that some lanes do not matter.
#pragma once

#ifndef __AVX2__
#error "the twins need AVX2, FMA and F16C"
#endif

// The compiler's parts refuse to be included but from its own <immintrin.h>, which has this guard.
#define _IMMINTRIN_H_INCLUDED
#include <x86gprintrin.h>
//
#include <smmintrin.h>
//
#include <avxintrin.h>
//
#include <avx2intrin.h>
//
#include <f16cintrin.h>
#include <fmaintrin.h>

#include <cstdint>
#include <cstring>

using __m512 = float __attribute__((vector_size(64), may_alias));
using __m512i = long long __attribute__((vector_size(64), may_alias));
using __m512bh = short __attribute__((vector_size(64), may_alias));
using __mmask16 = std::uint16_t;
using __mmask64 = std::uint64_t;

namespace twins {

using I32 = std::int32_t __attribute__((vector_size(64)));
using U32 = std::uint32_t __attribute__((vector_size(64)));
using U64 = std::uint64_t __attribute__((vector_size(64)));
using I16 = std::int16_t __attribute__((vector_size(64)));
using U16 = std::uint16_t __attribute__((vector_size(64)));
using I8 = std::int8_t __attribute__((vector_size(64)));
using U8 = std::uint8_t __attribute__((vector_size(64)));

constexpr std::uint8_t kUndefined = 0xd5;
constexpr std::uint32_t kSign = 0x80000000u, kExponent = 0x7f800000u;

inline bool bit(unsigned long long mask, int i) { return (mask >> i & 1) != 0; }

// An access of `bytes` at p happens, whatever is done with them.
inline void touch(const void* p, int bytes) {
  const volatile char* at = static_cast<const volatile char*>(p);
  (void)at[0];
  (void)at[bytes - 1];
}
inline void require_aligned(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 64 != 0) __builtin_trap();
}

template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V>
inline V load(const void* p) {
  touch(p, sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

inline __m256i low(__m512i v) {
  __m256i half;
  std::memcpy(&half, &v, sizeof(half));
  return half;
}
inline __m256i high(__m512i v) {
  __m256i half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof(half), sizeof(half));
  return half;
}
inline __m512i both(__m256i low, __m256i high) {
  __m512i v;
  std::memcpy(&v, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&v) + sizeof(low), &high, sizeof(high));
  return v;
}
inline __m256 low(__m512 v) { return _mm256_castsi256_ps(low((__m512i)v)); }
inline __m256 high(__m512 v) { return _mm256_castsi256_ps(high((__m512i)v)); }
inline __m512 both(__m256 low, __m256 high) {
  return (__m512)both(_mm256_castps_si256(low), _mm256_castps_si256(high));
}

// bfloat16, as AVX512-BF16 and AMX take it: subnormal inputs are zeros, and so are subnormal
// results, whatever MXCSR says.
inline float flushed(float v) {
  const auto bits = bits_as<std::uint32_t>(v);
  return (bits & kExponent) == 0 ? bits_as<float>(bits & kSign) : v;
}
inline float from_bfloat16(std::uint16_t v) {
  return flushed(bits_as<float>(static_cast<std::uint32_t>(v) << 16));
}
inline std::uint16_t to_bfloat16(float v) {
  const auto bits = bits_as<std::uint32_t>(flushed(v));
  if ((bits & ~kSign) > kExponent) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline float multiply_add(float sum, std::uint16_t a, std::uint16_t b) {
  return flushed(__builtin_fmaf(from_bfloat16(a), from_bfloat16(b), flushed(sum)));
}

}  // namespace twins

// Registers made, loaded and stored.

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float v) { return __m512{} + v; }
inline __m512i _mm512_set1_epi8(char v) {
  return twins::both(_mm256_set1_epi8(v), _mm256_set1_epi8(v));
}
inline __m512i _mm512_set1_epi16(short v) {
  return twins::both(_mm256_set1_epi16(v), _mm256_set1_epi16(v));
}
inline __m512i _mm512_set1_epi32(int v) { return (__m512i)(twins::I32{} + v); }
inline __m512i _mm512_set1_epi64(long long v) { return __m512i{} + v; }
template <typename... T>
inline __m512i _mm512_setr_epi32(T... lanes) {
  static_assert(sizeof...(T) == 16);
  return (__m512i)twins::I32{lanes...};
}
template <typename... T>
inline __m512i _mm512_set_epi16(T... from_the_last) {
  static_assert(sizeof...(T) == 32);
  const std::int16_t lanes[] = {static_cast<std::int16_t>(from_the_last)...};
  twins::I16 v{};
  for (int i = 0; i < 32; ++i) v[i] = lanes[31 - i];
  return (__m512i)v;
}
template <typename... T>
inline __m512i _mm512_set_epi8(T... from_the_last) {
  static_assert(sizeof...(T) == 64);
  const std::uint8_t lanes[] = {static_cast<std::uint8_t>(from_the_last)...};
  twins::U8 v{};
  for (int i = 0; i < 64; ++i) v[i] = lanes[63 - i];
  return (__m512i)v;
}

inline __m512 _mm512_loadu_ps(const void* p) { return twins::load<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return twins::load<__m512i>(p); }
inline __m512i _mm512_load_si512(const void* p) {
  twins::require_aligned(p);
  return twins::load<__m512i>(p);
}
inline void _mm512_storeu_ps(void* p, __m512 v) { twins::store(p, v); }
inline void _mm512_storeu_si512(void* p, __m512i v) { twins::store(p, v); }
inline void _mm512_stream_ps(float* p, __m512 v) {
  twins::require_aligned(p);
  twins::store(p, v);
}
inline void _mm512_stream_si512(void* p, __m512i v) {
  twins::require_aligned(p);
  twins::store(p, v);
}

// Lanes that the mask leaves out are not touched in memory.
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  twins::I32 v{};
  for (int i = 0; i < 16; ++i) {
    if (twins::bit(mask, i)) {
      v[i] = twins::load<std::int32_t>(static_cast<const std::int32_t*>(p) + i);
    }
  }
  return (__m512i)v;
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return (__m512)_mm512_maskz_loadu_epi32(mask, p);
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; ++i) {
    if (twins::bit(mask, i)) twins::store(static_cast<float*>(p) + i, v[i]);
  }
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  std::int16_t v[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (twins::bit(mask, i)) {
      v[i] = twins::load<std::int16_t>(static_cast<const std::int16_t*>(p) + i);
    }
  }
  return twins::load<__m256i>(v);
}
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  std::int16_t lanes[16];
  twins::store(lanes, v);
  for (int i = 0; i < 16; ++i) {
    if (twins::bit(mask, i)) twins::store(static_cast<std::int16_t*>(p) + i, lanes[i]);
  }
}
inline __m512i _mm512_i32gather_epi32(__m512i index, const void* base, int scale) {
  const auto at = (twins::I32)index;
  twins::I32 v{};
  for (int i = 0; i < 16; ++i) {
    v[i] = twins::load<std::int32_t>(static_cast<const char*>(base) + std::int64_t{at[i]} * scale);
  }
  return (__m512i)v;
}
inline __m512 _mm512_i32gather_ps(__m512i index, const void* base, int scale) {
  return (__m512)_mm512_i32gather_epi32(index, base, scale);
}

// Casts, halves and quarters.

inline __m512 _mm512_castsi512_ps(__m512i v) { return (__m512)v; }
inline __m512i _mm512_castps_si512(__m512 v) { return (__m512i)v; }
inline __m256i _mm512_castsi512_si256(__m512i v) { return twins::low(v); }
inline __m512i _mm512_castsi256_si512(__m256i v) {
  return twins::both(v, _mm256_set1_epi8(static_cast<char>(twins::kUndefined)));
}
inline __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
  return half % 2 == 0 ? twins::low(v) : twins::high(v);
}
inline __m512i _mm512_broadcast_i64x4(__m256i v) { return twins::both(v, v); }
inline __m512i _mm512_broadcast_i32x4(__m128i v) {
  return _mm512_broadcast_i64x4(_mm256_broadcastsi128_si256(v));
}

// Arithmetic.

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return twins::both(_mm256_fmadd_ps(twins::low(a), twins::low(b), twins::low(c)),
                     _mm256_fmadd_ps(twins::high(a), twins::high(b), twins::high(c)));
}
inline __m512 _mm512_maskz_div_ps(__mmask16 mask, __m512 a, __m512 b) {
  __m512 v{};
  for (int i = 0; i < 16; ++i) {
    if (twins::bit(mask, i)) v[i] = a[i] / b[i];
  }
  return v;
}
// The second operand where either is a NaN.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return twins::both(_mm256_max_ps(twins::low(a), twins::low(b)),
                     _mm256_max_ps(twins::high(a), twins::high(b)));
}
inline __m512 _mm512_abs_ps(__m512 v) { return (__m512)((twins::U32)v & ~twins::kSign); }
// Halves added to halves, as both compilers expand it.
inline float _mm512_reduce_add_ps(__m512 v) {
  float sum[16];
  twins::store(sum, v);
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) sum[i] = sum[i + n] + sum[i];
  }
  return sum[0];
}
inline unsigned _mm512_reduce_max_epu32(__m512i v) {
  const auto lanes = (twins::U32)v;
  unsigned most = 0;
  for (int i = 0; i < 16; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}
inline __m512i _mm512_max_epu32(__m512i a, __m512i b) {
  return twins::both(_mm256_max_epu32(twins::low(a), twins::low(b)),
                     _mm256_max_epu32(twins::high(a), twins::high(b)));
}
// Sums that overflow wrap.
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return (__m512i)((twins::U32)a + (twins::U32)b);
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return (__m512i)((twins::U32)a - (twins::U32)b);
}
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto x = (twins::I16)a, y = (twins::I16)b;
  auto v = (twins::U32)sum;
  for (int i = 0; i < 16; ++i) {
    v[i] += static_cast<std::uint32_t>(x[2 * i] * y[2 * i]);
    v[i] += static_cast<std::uint32_t>(x[2 * i + 1] * y[2 * i + 1]);
  }
  return (__m512i)v;
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto x = (twins::U8)a;
  const auto y = (twins::I8)b;
  auto v = (twins::U32)sum;
  for (int i = 0; i < 64; ++i) v[i / 4] += static_cast<std::uint32_t>(x[i] * y[i]);
  return (__m512i)v;
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  return twins::both(_mm256_madd_epi16(twins::low(a), twins::low(b)),
                     _mm256_madd_epi16(twins::high(a), twins::high(b)));
}
inline __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {
  return twins::both(_mm256_maddubs_epi16(twins::low(a), twins::low(b)),
                     _mm256_maddubs_epi16(twins::high(a), twins::high(b)));
}
inline __m512i _mm512_abs_epi8(__m512i v) {
  return twins::both(_mm256_abs_epi8(twins::low(v)), _mm256_abs_epi8(twins::high(v)));
}
// Two fused additions, that of the odd elements first.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = (twins::U16)a, y = (twins::U16)b;
  for (int i = 0; i < 16; ++i) {
    const float odd = twins::multiply_add(sum[i], x[2 * i + 1], y[2 * i + 1]);
    sum[i] = twins::multiply_add(odd, x[2 * i], y[2 * i]);
  }
  return sum;
}

// Bits.

inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i v{};
  for (int i = 0; i < 8; ++i) {
    if (!twins::bit(static_cast<unsigned>(table), i)) continue;
    v |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return v;
}
inline __m512i _mm512_slli_epi32(__m512i v, unsigned n) {
  return n > 31 ? __m512i{} : (__m512i)((twins::U32)v << n);
}
inline __m512i _mm512_srli_epi32(__m512i v, unsigned n) {
  return n > 31 ? __m512i{} : (__m512i)((twins::U32)v >> n);
}
inline __m512i _mm512_srli_epi16(__m512i v, unsigned n) {
  return n > 15 ? __m512i{} : (__m512i)((twins::U16)v >> static_cast<std::uint16_t>(n));
}
inline __m512i _mm512_srlv_epi32(__m512i v, __m512i counts) {
  return twins::both(_mm256_srlv_epi32(twins::low(v), twins::low(counts)),
                     _mm256_srlv_epi32(twins::high(v), twins::high(counts)));
}
inline __m512i _mm512_srlv_epi16(__m512i v, __m512i counts) {
  const auto n = (twins::U16)counts;
  auto lanes = (twins::U16)v;
  for (int i = 0; i < 32; ++i) {
    lanes[i] = n[i] > 15 ? std::uint16_t{0} : static_cast<std::uint16_t>(lanes[i] >> n[i]);
  }
  return (__m512i)lanes;
}

// Masks.

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    bool holds = false;
    switch (predicate) {
      case _CMP_LT_OQ:
        holds = a[i] < b[i];
        break;
      case _CMP_GT_OQ:
        holds = a[i] > b[i];
        break;
      case _CMP_GE_OQ:
        holds = a[i] >= b[i];
        break;
      case _CMP_NEQ_UQ:
        holds = !(a[i] == b[i]);
        break;
      case _CMP_UNORD_Q:
        holds = __builtin_isnan(a[i]) || __builtin_isnan(b[i]);
        break;
      default:
        __builtin_trap();
    }
    mask |= static_cast<unsigned>(holds) << i;
  }
  return static_cast<__mmask16>(mask);
}
inline __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i v) {
  const auto from = (twins::I32)v;
  auto to = (twins::I32)otherwise;
  for (int i = 0; i < 16; ++i) to[i] = twins::bit(mask, i) ? from[i] : to[i];
  return (__m512i)to;
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 v) {
  return (__m512)_mm512_mask_mov_epi32(__m512i{}, mask, (__m512i)v);
}
inline __m512i _mm512_mask_set1_epi32(__m512i otherwise, __mmask16 mask, int v) {
  return _mm512_mask_mov_epi32(otherwise, mask, _mm512_set1_epi32(v));
}
inline __m512i _mm512_mask_add_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return _mm512_mask_mov_epi32(otherwise, mask, _mm512_add_epi32(a, b));
}
inline __m512i _mm512_mask_or_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return _mm512_mask_mov_epi32(otherwise, mask, a | b);
}

inline __mmask64 _mm512_movepi8_mask(__m512i v) {
  const auto low = static_cast<std::uint32_t>(_mm256_movemask_epi8(twins::low(v)));
  const auto high = static_cast<std::uint32_t>(_mm256_movemask_epi8(twins::high(v)));
  return static_cast<__mmask64>(high) << 32 | low;
}
inline __m512i _mm512_mask_sub_epi8(__m512i otherwise, __mmask64 mask, __m512i a, __m512i b) {
  const auto x = (twins::U8)a, y = (twins::U8)b;
  auto v = (twins::U8)otherwise;
  for (int i = 0; i < 64; ++i) {
    if (twins::bit(mask, i)) v[i] = static_cast<std::uint8_t>(x[i] - y[i]);
  }
  return (__m512i)v;
}

// Look-ups: the low bits of each index count.

inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i table) {
  const auto at = (twins::U32)index, from = (twins::U32)table;
  twins::U32 v{};
  for (int i = 0; i < 16; ++i) v[i] = from[at[i] % 16];
  return (__m512i)v;
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 table) {
  return (__m512)_mm512_permutexvar_epi32(index, (__m512i)table);
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i table) {
  const auto at = (twins::U16)index, from = (twins::U16)table;
  twins::U16 v{};
  for (int i = 0; i < 32; ++i) v[i] = from[at[i] % 32];
  return (__m512i)v;
}
inline __m512i _mm512_permutexvar_epi8(__m512i index, __m512i table) {
  const auto at = (twins::U8)index, from = (twins::U8)table;
  twins::U8 v{};
  for (int i = 0; i < 64; ++i) v[i] = from[at[i] % 64];
  return (__m512i)v;
}
inline __m512i _mm512_permutex2var_epi32(__m512i first, __m512i index, __m512i second) {
  const auto at = (twins::U32)index, a = (twins::U32)first, b = (twins::U32)second;
  twins::U32 v{};
  for (int i = 0; i < 16; ++i) v[i] = (at[i] & 16 ? b : a)[at[i] % 16];
  return (__m512i)v;
}
inline __m512 _mm512_permutex2var_ps(__m512 first, __m512i index, __m512 second) {
  return (__m512)_mm512_permutex2var_epi32((__m512i)first, index, (__m512i)second);
}
// Within each 128 bits; an index with its highest bit set gives zero.
inline __m512i _mm512_shuffle_epi8(__m512i table, __m512i index) {
  return twins::both(_mm256_shuffle_epi8(twins::low(table), twins::low(index)),
                     _mm256_shuffle_epi8(twins::high(table), twins::high(index)));
}
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
  return twins::both(_mm256_unpacklo_epi32(twins::low(a), twins::low(b)),
                     _mm256_unpacklo_epi32(twins::high(a), twins::high(b)));
}
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
  return twins::both(_mm256_unpackhi_epi32(twins::low(a), twins::low(b)),
                     _mm256_unpackhi_epi32(twins::high(a), twins::high(b)));
}
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
  return twins::both(_mm256_unpacklo_epi64(twins::low(a), twins::low(b)),
                     _mm256_unpacklo_epi64(twins::high(a), twins::high(b)));
}
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
  return twins::both(_mm256_unpackhi_epi64(twins::low(a), twins::low(b)),
                     _mm256_unpackhi_epi64(twins::high(a), twins::high(b)));
}
// Two quarters of a, then two of b.
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int quarters) {
  __m512i v{};
  for (int i = 0; i < 8; ++i) {
    const int from = quarters >> i / 2 * 2 & 3;
    v[i] = (i < 4 ? a : b)[2 * from + i % 2];
  }
  return v;
}

// Conversions.

inline __m512i _mm512_cvtps_epi32(__m512 v) {
  return twins::both(_mm256_cvtps_epi32(twins::low(v)), _mm256_cvtps_epi32(twins::high(v)));
}
inline __m512i _mm512_cvttps_epi32(__m512 v) {
  return twins::both(_mm256_cvttps_epi32(twins::low(v)), _mm256_cvttps_epi32(twins::high(v)));
}
inline __m512 _mm512_cvtepi32_ps(__m512i v) {
  return twins::both(_mm256_cvtepi32_ps(twins::low(v)), _mm256_cvtepi32_ps(twins::high(v)));
}
inline __m512 _mm512_cvtph_ps(__m256i v) {
  return twins::both(_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                     _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
inline __m256i _mm512_cvtps_ph(__m512 v, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  return _mm256_setr_m128i(_mm256_cvtps_ph(twins::low(v), kNearest),
                           _mm256_cvtps_ph(twins::high(v), kNearest));
}
inline __m512i _mm512_cvtepu8_epi32(__m128i v) {
  return twins::both(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  return twins::both(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)),
                     _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
// The low bits of each lane.
inline __m256i _mm512_cvtepi32_epi16(__m512i v) {
  const auto lanes = (twins::U32)v;
  std::uint16_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::uint16_t>(lanes[i]);
  return twins::load<__m256i>(to);
}
inline __m128i _mm512_cvtepi32_epi8(__m512i v) {
  const auto lanes = (twins::U32)v;
  std::uint8_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::uint8_t>(lanes[i]);
  return twins::load<__m128i>(to);
}
// The second operand's 16 lanes come first.
inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  twins::U16 v{};
  for (int i = 0; i < 16; ++i) {
    v[i] = twins::to_bfloat16(b[i]);
    v[16 + i] = twins::to_bfloat16(a[i]);
  }
  return (__m512bh)v;
}

#include "amx_twins.h"
