// Quantise and dequantise over flat blocks. Included once per instruction set, after its Simd.
// Codes, scales and values are the same bits on each: no fused multiply-add, no approximation.
#pragma once

namespace qkern::cpu {
namespace {

constexpr int kGroup = 32;  // the smallest block: 16 packed bytes
constexpr int kGroupRegisters = kGroup / Simd::kLanes;

inline std::int64_t min64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t max64(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Magnitudes compare as integers in every float format, and a NaN above infinity.
inline std::uint32_t magnitude_bits(float v) { return float_bits(v) & 0x7fffffffu; }
inline std::uint16_t magnitude_bits(BFloat16 v) { return v.bits & 0x7fffu; }
inline std::uint16_t magnitude_bits(Float16 v) { return v.bits & 0x7fffu; }

inline float magnitude_value(std::uint32_t bits, float) { return float_from_bits(bits); }
inline float magnitude_value(std::uint16_t bits, BFloat16) { return to_float(BFloat16{bits}); }
inline float magnitude_value(std::uint16_t bits, Float16) { return to_float(Float16{bits}); }

// max |x|; NaN where any element is NaN or infinite.
template <typename T>
float block_absmax(const T* x, std::int64_t n) {
  auto largest = magnitude_bits(x[0]);
  for (std::int64_t i = 1; i < n; ++i) {
    const auto bits = magnitude_bits(x[i]);
    largest = bits > largest ? bits : largest;
  }
  const float absmax = magnitude_value(largest, x[0]);
  return float_bits(absmax) >= kFloatInf ? float_from_bits(kFloatQuietNan) : absmax;
}

// 1 / absmax; 0 for a block of zeros, which sends every t to 0.
inline float block_reciprocal(float absmax) { return absmax == 0.0f ? 0.0f : 1.0f / absmax; }

// S is Simd: a parameter, so that the branch not taken need not compile.
template <bool kBins, typename T, typename S = Simd>
void encode_groups(const T* x, std::int64_t groups, float reciprocal,
                   const typename S::Encoder& encoder, std::uint8_t* packed) {
  const typename S::F scale = S::set1(reciprocal);
  for (std::int64_t g = 0; g < groups; ++g) {
    if constexpr (S::kByteTables) {
      typename S::F values[kGroupRegisters];
      for (int i = 0; i < kGroupRegisters; ++i) {
        values[i] = S::load(x + g * kGroup + i * S::kLanes);
      }
      encoder.template encode32<kBins>(values, scale, packed + g * (kGroup / 2));
    } else {
      typename S::I codes[kGroupRegisters];
      for (int i = 0; i < kGroupRegisters; ++i) {
        const typename S::F value = S::load(x + g * kGroup + i * S::kLanes);
        codes[i] = encoder.template encode<kBins>(S::mul(value, scale), value);
      }
      S::pack32(codes, packed + g * (kGroup / 2));
    }
  }
}

template <typename T>
void encode_block(const T* x, std::int64_t n, float absmax, const Simd::Encoder& encoder,
                  std::uint8_t* packed) {
  const float reciprocal = block_reciprocal(absmax);
  const std::int64_t groups = n / kGroup;
  // With an infinite reciprocal (subnormal absmax) or a NaN, t leaves [-1, 1] and so the bins.
  const bool in_range = float_bits(reciprocal) < kFloatInf;
  if (encoder.table.has_bins && in_range) {
    encode_groups<true>(x, groups, reciprocal, encoder, packed);
  } else {
    encode_groups<false>(x, groups, reciprocal, encoder, packed);
  }
  const std::int64_t done = groups * kGroup;
  const std::int64_t rest = n - done;
  if (rest == 0) return;
  // The tail goes through the same code, padded with zeros, as the format pads an odd last byte.
  T padded[kGroup] = {};
  for (std::int64_t i = 0; i < rest; ++i) padded[i] = x[done + i];
  std::uint8_t bytes[kGroup / 2];
  encode_groups<false>(padded, 1, reciprocal, encoder, bytes);
  std::memcpy(packed + done / 2, bytes, static_cast<std::size_t>((rest + 1) / 2));
}

template <typename T>
void quantize_4bit(const void* x_data, BlockRange range, const EncodeTable& table,
                   std::uint8_t* packed, float* absmax) {
  const T* x = static_cast<const T*>(x_data);
  const Simd::Encoder encoder(table);
  for (std::int64_t b = range.begin; b < range.end; ++b) {
    const std::int64_t start = b * range.block_size;
    const std::int64_t n = min64(range.block_size, range.numel - start);
    absmax[b] = block_absmax(x + start, n);
    encode_block(x + start, n, absmax[b], encoder, packed + start / 2);
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

// n weights of one block, from the start of a byte. S is Simd, as in encode_groups.
template <typename S = Simd>
void decode_block(const std::uint8_t* packed, std::int64_t n, const typename S::Lut& lut,
                  float* out) {
  constexpr int kBytes = Simd::kLanes / 2;
  std::int64_t i = 0;
  if constexpr (S::kByteTables) {
    const typename S::Lut held = lut;  // in registers, since what is stored might be the table
    for (; i + kGroup <= n; i += kGroup) S::decode32(packed + i / 2, held, out + i);
  }
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) {
    Simd::storeu(out + i, Simd::natural(packed + i / 2, lut));
  }
  if (i == n) return;
  std::uint8_t bytes[kBytes] = {};
  std::memcpy(bytes, packed + i / 2, static_cast<std::size_t>((n - i + 1) / 2));
  Simd::store_partial(out + i, Simd::natural(bytes, lut), static_cast<int>(n - i));
}

// One block with its scale. 16 distinct values a block: scale and round those, then look up.
inline void decode_scaled(const std::uint8_t* packed, std::int64_t n, const float* codes,
                          float scale, float* out) {
  decode_block(packed, n, Simd::scale_lut(Simd::make_lut(codes), scale), out);
}

template <typename T>
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
  for (; i + kGroup <= n; i += kGroup) Simd::decode32(packed + i / 2, lut, values + i);
  for (; i < n; ++i) {
    const std::uint8_t byte = packed[i / 2];
    values[i] = bits[i % 2 == 0 ? byte >> 4 : byte & 15];
  }
}

template <typename T>
void dequantize_4bit(const Weight4bit& weight, BlockRange range, void* out_data) {
  constexpr std::int64_t kScales = 256;
  const float* codes = code_values(weight.codes);
  T* out = static_cast<T*>(out_data);
  float scales[kScales];
  for (std::int64_t first = range.begin; first < range.end; first += kScales) {
    const std::int64_t count = min64(kScales, range.end - first);
    load_scales(weight, first, count, scales);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t start = (first + i) * range.block_size;
      const std::int64_t n = min64(range.block_size, range.numel - start);
      decode_scaled(weight.packed + start / 2, n, codes, scales[i], out + start);
    }
  }
}

template <typename T>
void quantize_8bit(const void* x_data, BlockRange range, const float* thresholds,
                   std::uint8_t* codes, float* absmax) {
  const T* x = static_cast<const T*>(x_data);
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
