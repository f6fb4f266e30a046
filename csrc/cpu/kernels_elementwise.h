// Quantise and dequantise over flat blocks. Codes, scales and values are the same bits on each
// instruction set: no fused multiply-add, no approximation.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "qkern/codes.h"
#include "qkern/ops.h"
#include "simd.h"

namespace qkern::cpu {
namespace {

constexpr int kGroup = 32;  // the smallest block: 16 packed bytes
constexpr int kGroupRegisters = kGroup / Simd::kLanes;

inline std::int64_t min64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t max64(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

template <typename T>
void convert_row(const T* from, std::int64_t n, float* to) {
  std::int64_t i = 0;
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::storeu(to + i, Simd::load(from + i));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    Simd::store_partial(to + i, Simd::load_partial(from + i, rest), rest);
  }
}

template <typename T>
void store_row(const float* from, std::int64_t n, T* to) {
  std::int64_t i = 0;
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::store(to + i, Simd::loadu(from + i));
  for (; i < n; ++i) to[i] = from_float<T>(from[i]);
}

// Magnitudes compare as integers in every float format, and a NaN above infinity.
inline std::uint32_t magnitude_bits(float v) { return float_bits(v) & 0x7fffffffu; }
inline std::uint16_t magnitude_bits(BFloat16 v) { return v.bits & 0x7fffu; }
inline std::uint16_t magnitude_bits(Float16 v) { return v.bits & 0x7fffu; }

inline float magnitude_value(std::uint32_t bits, float) { return float_from_bits(bits); }
inline float magnitude_value(std::uint16_t bits, BFloat16) { return to_float(BFloat16{bits}); }
inline float magnitude_value(std::uint16_t bits, Float16) { return to_float(Float16{bits}); }

template <typename T>
using MagnitudeBits = decltype(magnitude_bits(T{}));

// The largest magnitude of whole groups. One maximum for each place in a group: compilers make
// registers of the array.
template <typename T>
__attribute__((always_inline)) inline MagnitudeBits<T> groups_magnitude(const T* x,
                                                                        std::int64_t groups) {
  MagnitudeBits<T> largest[kGroup] = {};
  for (std::int64_t g = 0; g < groups; ++g) {
    for (int i = 0; i < kGroup; ++i) {
      const MagnitudeBits<T> bits = magnitude_bits(x[g * kGroup + i]);
      largest[i] = bits > largest[i] ? bits : largest[i];
    }
  }
  return Simd::largest(largest);
}

// NaN for an infinity or a NaN.
template <typename T>
float absmax_of(MagnitudeBits<T> largest) {
  const float absmax = magnitude_value(largest, T{});
  return float_bits(absmax) >= kFloatInf ? float_from_bits(kFloatQuietNan) : absmax;
}

// max |x|; NaN where any element is NaN or infinite.
template <typename T>
float block_absmax(const T* x, std::int64_t n) {
  MagnitudeBits<T> largest = groups_magnitude(x, n / kGroup);
  for (std::int64_t i = n - n % kGroup; i < n; ++i) {
    const MagnitudeBits<T> bits = magnitude_bits(x[i]);
    largest = bits > largest ? bits : largest;
  }
  return absmax_of<T>(largest);
}

// 1 / absmax; 0 for a block of zeros, which sends every t to 0.
inline float block_reciprocal(float absmax) { return absmax == 0.0f ? 0.0f : 1.0f / absmax; }

// S is Simd: a parameter, so that the branch not taken need not compile.
template <Lookup kLookup, typename T, typename S = Simd>
__attribute__((always_inline)) inline void encode_groups(const T* x, std::int64_t groups,
                                                         float reciprocal,
                                                         const typename S::Encoder& encoder,
                                                         std::uint8_t* packed) {
  const typename S::F scale = S::set1(reciprocal);
  for (std::int64_t g = 0; g < groups; ++g) {
    typename S::F values[kGroupRegisters];
    S::load_group(x + g * kGroup, values);
    if constexpr (S::kByteTables) {
      encoder.template encode32<kLookup>(values, scale, packed + g * (kGroup / 2));
    } else {
      typename S::I codes[kGroupRegisters];
      for (int i = 0; i < kGroupRegisters; ++i) {
        codes[i] = encoder.template encode<kLookup>(S::mul(values[i], scale), values[i]);
      }
      S::pack_group(codes, packed + g * (kGroup / 2));
    }
  }
}

// A block that is no whole number of groups. It goes through the same code, padded with zeros, as
// the format pads an odd last byte.
template <typename T>
void quantize_tail(const T* x, std::int64_t n, const Simd::Encoder& encoder, std::uint8_t* packed,
                   float* absmax) {
  *absmax = block_absmax(x, n);
  const float reciprocal = block_reciprocal(*absmax);
  const std::int64_t groups = n / kGroup;
  encode_groups<Lookup::kCount>(x, groups, reciprocal, encoder, packed);
  const std::int64_t done = groups * kGroup;
  const std::int64_t rest = n - done;
  T padded[kGroup] = {};
  for (std::int64_t i = 0; i < rest; ++i) padded[i] = x[done + i];
  std::uint8_t bytes[kGroup / 2];
  encode_groups<Lookup::kCount>(padded, 1, reciprocal, encoder, bytes);
  std::memcpy(packed + done / 2, bytes, static_cast<std::size_t>((rest + 1) / 2));
}

template <Lookup kLookup, typename T>
void quantize_blocks(const T* x, BlockRange range, const EncodeTable& table, std::uint8_t* packed,
                     float* absmax) {
  const Simd::Encoder encoder(table);
  const std::int64_t groups = range.block_size / kGroup;
  const std::int64_t whole = min64(range.end, range.numel / range.block_size);
  std::int64_t b = range.begin;
  for (; b < whole; ++b) {
    const T* block = x + b * range.block_size;
    std::uint8_t* to = packed + b * (range.block_size / 2);
    absmax[b] = absmax_of<T>(groups_magnitude(block, groups));
    const float reciprocal = block_reciprocal(absmax[b]);
    // With an infinite reciprocal (subnormal absmax) or a NaN, t leaves [-1, 1] and so the bins.
    if (float_bits(reciprocal) < kFloatInf) {
      encode_groups<kLookup>(block, groups, reciprocal, encoder, to);
    } else {
      encode_groups<Lookup::kCount>(block, groups, reciprocal, encoder, to);
    }
  }
  if (b == range.end) return;
  const std::int64_t start = b * range.block_size;
  quantize_tail(x + start, range.numel - start, encoder, packed + start / 2, absmax + b);
}

template <typename T>
void quantize_4bit(const void* x_data, BlockRange range, const EncodeTable& table,
                   std::uint8_t* packed, float* absmax) {
  const T* x = static_cast<const T*>(x_data);
  switch (table.lookup) {
    case Lookup::kBins:
      return quantize_blocks<Lookup::kBins>(x, range, table, packed, absmax);
    case Lookup::kBinsPermuted:
      return quantize_blocks<Lookup::kBinsPermuted>(x, range, table, packed, absmax);
    case Lookup::kBinsMagnitude:
      return quantize_blocks<Lookup::kBinsMagnitude>(x, range, table, packed, absmax);
    default:
      return quantize_blocks<Lookup::kCount>(x, range, table, packed, absmax);
  }
}

inline const float* code_values(const Codebook& codes) {
  switch (codes.format) {
    case kFormatNf4:
      return kNf4Codes;
    case kFormatFp4:
      return kFp4Codes;
    default:
      return codes.codebook;
  }
}

// Float scales of blocks [begin, begin + count), double-quantised ones restored.
inline void load_scales(const Weight4bit& weight, std::int64_t begin, std::int64_t count,
                        float* out) {
  if (weight.nested_absmax == nullptr) {
    std::memcpy(out, static_cast<const float*>(weight.absmax) + begin,
                static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const std::uint8_t* codes = static_cast<const std::uint8_t*>(weight.absmax);
  const Simd::F offset = Simd::set1(weight.nested_offset[0]);
  std::int64_t i = 0;
  while (i < count) {
    const std::int64_t nested = (begin + i) / kNestedBlockSize;
    const std::int64_t stop = min64(count, (nested + 1) * kNestedBlockSize - begin);
    const Simd::F scale = Simd::set1(weight.nested_absmax[nested]);
    for (; i + Simd::kLanes <= stop; i += Simd::kLanes) {
      const Simd::F value = Simd::gather_bytes(kDynamicMapSigned, codes + begin + i);
      Simd::storeu(out + i, Simd::add(Simd::mul(value, scale), offset));
    }
    for (; i < stop; ++i) {
      out[i] = kDynamicMapSigned[codes[begin + i]] * weight.nested_absmax[nested] +
               weight.nested_offset[0];
    }
  }
}

// n weights of one block, from the start of a byte. kStream: past the caches, to aligned memory. S
// is Simd, as in encode_groups.
template <bool kStream = false, typename S = Simd>
void decode_block(const std::uint8_t* packed, std::int64_t n, const typename S::Lut& lut,
                  float* out) {
  constexpr int kBytes = Simd::kLanes / 2;
  std::int64_t i = 0;
  if constexpr (S::kByteTables) {
    const typename S::Lut held = lut;  // in registers, since what is stored might be the table
    for (; i + kGroup <= n; i += kGroup) {
      S::template decode32<kStream>(packed + i / 2, held, out + i);
    }
  }
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) {
    Simd::put<kStream>(out + i, Simd::natural(packed + i / 2, lut));
  }
  if (i == n) return;
  std::uint8_t bytes[kBytes] = {};
  std::memcpy(bytes, packed + i / 2, static_cast<std::size_t>((n - i + 1) / 2));
  Simd::store_partial(out + i, Simd::natural(bytes, lut), static_cast<int>(n - i));
}

// One block with its scale. 16 distinct values a block: scale and round those, then look up.
template <bool kStream = false>
void decode_scaled(const std::uint8_t* packed, std::int64_t n, const float* codes, float scale,
                   float* out) {
  decode_block<kStream>(packed, n, Simd::scale_lut(Simd::make_lut(codes), scale), out);
}

template <bool kStream = false, typename T>
void decode_scaled(const std::uint8_t* packed, std::int64_t n, const float* codes, float scale,
                   T* out) {
  T table[16];
  for (int i = 0; i < 16; i += Simd::kLanes) {
    Simd::store(table + i, Simd::mul(Simd::loadu(codes + i), Simd::set1(scale)));
  }
  std::uint16_t bits[16];
  std::memcpy(bits, table, sizeof(bits));
  const Simd::Lut16 lut = Simd::make_lut16(bits);
  std::uint16_t* values = reinterpret_cast<std::uint16_t*>(out);
  std::int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) Simd::decode32<kStream>(packed + i / 2, lut, values + i);
  for (; i < n; ++i) {
    const std::uint8_t byte = packed[i / 2];
    values[i] = bits[i % 2 == 0 ? byte >> 4 : byte & 15];
  }
}

template <bool kStream, typename T>
void dequantize_blocks(const Weight4bit& weight, BlockRange range, T* out) {
  constexpr std::int64_t kScales = 256;
  const float* codes = code_values(weight.codes);
  float scales[kScales];
  for (std::int64_t first = range.begin; first < range.end; first += kScales) {
    const std::int64_t count = min64(kScales, range.end - first);
    load_scales(weight, first, count, scales);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t start = (first + i) * range.block_size;
      const std::int64_t n = min64(range.block_size, range.numel - start);
      decode_scaled<kStream>(weight.packed + start / 2, n, codes, scales[i], out + start);
    }
  }
  if (kStream) Simd::fence();
}

template <typename T>
void dequantize_4bit(const Weight4bit& weight, BlockRange range, void* out_data, bool past_caches) {
  T* out = static_cast<T*>(out_data);
  if (past_caches) {
    dequantize_blocks<true>(weight, range, out);
  } else {
    dequantize_blocks<false>(weight, range, out);
  }
}

template <typename T>
void quantize_8bit(const void* x_data, BlockRange range, const float* threshold_values,
                   std::uint8_t* codes, float* absmax) {
  const T* x = static_cast<const T*>(x_data);
  const Simd::Thresholds thresholds(threshold_values);
  for (std::int64_t b = range.begin; b < range.end; ++b) {
    const std::int64_t start = b * range.block_size;
    const std::int64_t n = min64(range.block_size, range.numel - start);
    absmax[b] = block_absmax(x + start, n);
    const Simd::F reciprocal = Simd::set1(block_reciprocal(absmax[b]));
    std::int64_t i = 0;
    for (; i + Simd::kLanes <= n; i += Simd::kLanes) {
      const Simd::F t = Simd::mul(Simd::load(x + start + i), reciprocal);
      Simd::store_bytes(codes + start + i, Simd::count_below(t, thresholds));
    }
    if (i == n) continue;
    const int rest = static_cast<int>(n - i);
    const Simd::F t = Simd::mul(Simd::load_partial(x + start + i, rest), reciprocal);
    std::uint8_t tail[Simd::kLanes];
    Simd::store_bytes(tail, Simd::count_below(t, thresholds));
    std::memcpy(codes + start + i, tail, static_cast<std::size_t>(rest));
  }
}

template <typename T>
void dequantize_8bit(const std::uint8_t* codes, const float* absmax, const float* map,
                     BlockRange range, void* out_data) {
  T* out = static_cast<T*>(out_data);
  for (std::int64_t b = range.begin; b < range.end; ++b) {
    const std::int64_t start = b * range.block_size;
    const std::int64_t n = min64(range.block_size, range.numel - start);
    const Simd::F scale = Simd::set1(absmax[b]);
    std::int64_t i = 0;
    for (; i + Simd::kLanes <= n; i += Simd::kLanes) {
      const Simd::F value = Simd::gather_bytes(map, codes + start + i);
      Simd::store(out + start + i, Simd::mul(value, scale));
    }
    for (; i < n; ++i) out[start + i] = from_float<T>(map[codes[start + i]] * absmax[b]);
  }
}

}  // namespace
}  // namespace qkern::cpu
