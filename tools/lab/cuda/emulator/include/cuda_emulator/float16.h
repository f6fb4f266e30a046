#pragma once

#include <cstdint>
#include <cstring>

// CUDA's 16-bit floats and the conversions between them and float32: to nearest, ties to even, and
// one NaN, as PTX's cvt.rn. Not a copy of cuda_fp16.h: what is missing does not compile.
struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16_raw {
  unsigned short x;
};
struct __nv_bfloat16 {
  std::uint16_t bits;

  operator __nv_bfloat16_raw() const { return {bits}; }
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline std::uint32_t __float_as_uint(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<std::uint32_t>(bits)); }

inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  constexpr std::uint16_t kNan = 0x7fff;
  if (x != x) return {kNan};
  const std::uint32_t bits = __float_as_uint(x);
  const std::uint32_t ties_to_even = 0x7fff + (bits >> 16 & 1);
  return {static_cast<std::uint16_t>((bits + ties_to_even) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

inline float __half2float(__half x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000) << 16;
  const std::uint32_t exponent = x.bits >> 10 & 0x1f;
  const std::uint32_t mantissa = x.bits & 0x3ff;
  if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return __uint_as_float(sign | __float_as_uint(magnitude));
  }
  return __uint_as_float(sign | (exponent + (127 - 15)) << 23 | mantissa << 13);
}

inline __half __float2half_rn(float x) {
  constexpr std::uint16_t kNan = 0x7fff;
  constexpr std::uint32_t kOverflow = 0x477ff000;        // 65520: half way from 65504 to 2^16
  constexpr std::uint32_t kSmallestNormal = 0x38800000;  // 2^-14
  if (x != x) return {kNan};
  const std::uint32_t bits = __float_as_uint(x);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  std::uint32_t result;
  if (magnitude >= kOverflow) {
    result = 0x7c00;
  } else if (magnitude < kSmallestNormal) {
    // Adding 0.5 leaves 24 fraction bits below 2^-1, the unit of a subnormal: the addition rounds.
    result = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else {
    const std::uint32_t ties_to_even = 0xfff + (magnitude >> 13 & 1);
    result = (magnitude + ties_to_even - ((127u - 15u) << 23)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | result)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}

inline __half __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline std::uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(std::uint16_t bits) { return {bits}; }
