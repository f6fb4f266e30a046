#pragma once

#include <cstdint>
#include <cstring>

#include "qkern/dtype.h"

// Scalar conversions. Everything here has internal linkage: see kernels.h.
namespace qkern::cpu {
namespace {

constexpr std::uint32_t kFloatInf = 0x7f800000u;
constexpr std::uint32_t kFloatQuietNan = 0x7fc00000u;

inline std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  return float_from_bits(static_cast<std::uint32_t>(value.bits) << 16);
}

inline float to_float(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, or a NaN made quiet as the hardware does
    const std::uint32_t payload = (magnitude & 0x3ffu) << 13;
    return float_from_bits(sign | kFloatInf | payload | (payload != 0 ? 0x400000u : 0u));
  }
  if (magnitude < 0x400u) {  // subnormal: magnitude * 2^-24 is exact
    const float value_abs = static_cast<float>(magnitude) * 0x1p-24f;
    return float_from_bits(sign | float_bits(value_abs));
  }
  return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

// Round to nearest, ties to even.
template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > kFloatInf) return {static_cast<std::uint16_t>(0x7fc0u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > kFloatInf) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded subnormal
    half = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace
}  // namespace qkern::cpu
