// What a code stands for: conversions, the 16 values, the scales, and the two decoders (a float32
// table in shared memory; a scaled 16-bit table in registers).
#pragma once

#include <type_traits>

#include "ptx.h"
#include "qkern/codes.h"
#include "qkern/ops.h"

namespace qkern::cuda {
namespace {

// Conversions. Storage types are bits; float32 is what is computed in.

template <typename T>
QKERN_DEVICE float to_float(T value);
template <>
QKERN_DEVICE float to_float<float>(float value) {
  return value;
}
template <>
QKERN_DEVICE float to_float<BFloat16>(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
template <>
QKERN_DEVICE float to_float<Float16>(Float16 value) {
  return __half2float(__ushort_as_half(value.bits));
}

// As __bfloat16_as_ushort, which CUDA 12.1 and earlier have for sm_80 and later only.
QKERN_DEVICE std::uint16_t bits_of(__nv_bfloat16 value) {
  return static_cast<__nv_bfloat16_raw>(value).x;
}

template <typename T>
QKERN_DEVICE T from_float(float value);
template <>
QKERN_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
QKERN_DEVICE BFloat16 from_float<BFloat16>(float value) {
  return {bits_of(__float2bfloat16_rn(value))};
}
template <>
QKERN_DEVICE Float16 from_float<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// Whether nvcc has an instruction that rounds to bfloat16. Where it has none, its sequence of
// instructions asks of every value whether it is a NaN.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kRoundsToBFloat16 = true;
#else
constexpr bool kRoundsToBFloat16 = false;
#endif

// Two values in one register, `low` in the low half.
template <typename T>
QKERN_DEVICE std::uint32_t pack_pair(float low, float high);
template <>
QKERN_DEVICE std::uint32_t pack_pair<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  const std::uint32_t low_bits = bits_of(pair.x), high_bits = bits_of(pair.y);
  return low_bits | high_bits << 16;
}
template <>
QKERN_DEVICE std::uint32_t pack_pair<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return static_cast<std::uint32_t>(__half_as_ushort(pair.x)) |
         static_cast<std::uint32_t>(__half_as_ushort(pair.y)) << 16;
}

// `pack_pair` of values that are no NaNs.
template <typename T>
QKERN_DEVICE std::uint32_t pack_numbers(float low, float high) {
  if constexpr (std::is_same_v<T, BFloat16> && !kRoundsToBFloat16) {
    // To nearest, ties to even; the carry of the largest numbers makes an infinity.
    const auto rounded = [](float value) {
      const std::uint32_t bits = __float_as_uint(value);
      return bits + (bits >> 16 & 1u) + 0x7fffu;
    };
    return __byte_perm(rounded(low), rounded(high), 0x7632);
  } else {
    return pack_pair<T>(low, high);
  }
}

template <typename T>
QKERN_DEVICE void unpack_pair(std::uint32_t pair, float* out) {
  out[0] = to_float<T>(T{static_cast<std::uint16_t>(pair & 0xffffu)});
  out[1] = to_float<T>(T{static_cast<std::uint16_t>(pair >> 16)});
}

// Eight values of T from 16-aligned memory that no kernel writes.
template <typename T>
QKERN_DEVICE void load_global8(const T* from, float (&out)[8]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 bits = load_global16(from + 4 * half);
      out[4 * half + 0] = __uint_as_float(bits.x);
      out[4 * half + 1] = __uint_as_float(bits.y);
      out[4 * half + 2] = __uint_as_float(bits.z);
      out[4 * half + 3] = __uint_as_float(bits.w);
    }
  } else {
    const uint4 bits = load_global16(from);
    unpack_pair<T>(bits.x, out + 0);
    unpack_pair<T>(bits.y, out + 2);
    unpack_pair<T>(bits.z, out + 4);
    unpack_pair<T>(bits.w, out + 6);
  }
}

// Magnitudes compare as integers, and a NaN above infinity.
constexpr unsigned kInfBits = 0x7f800000u;
QKERN_DEVICE unsigned magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

QKERN_DEVICE bool is_aligned16(const void* p) {
  return (reinterpret_cast<std::uintptr_t>(p) & 15u) == 0;
}

template <typename... Pointers>
QKERN_DEVICE bool are_aligned16(Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) | ...) & 15u) == 0;
}

// The 16 values of a format.

// Where the values come from: nf4's and fp4's travel with the launch; a custom codebook lies in
// device memory, which the host must not read.
struct CodeSource {
  float values[16];
  const float* custom;
};

inline CodeSource code_source(const Codebook& codes) {
  CodeSource source{};
  if (codes.format == kFormatCustom) {
    source.custom = codes.codebook;
    return source;
  }
  for (int i = 0; i < 16; ++i) {
    source.values[i] = codes.format == kFormatNf4 ? kNf4Codes[i] : kFp4Codes[i];
  }
  return source;
}

struct CodeTable {
  float values[16];
};

// The first 16 threads fill the table; the caller synchronises. Constant indices: a computed one
// would copy the launch's parameters to the stack.
QKERN_DEVICE void stage_codes(const CodeSource& source, CodeTable& table) {
  if (source.custom != nullptr) {
    if (threadIdx.x < 16) table.values[threadIdx.x] = source.custom[threadIdx.x];
    return;
  }
#pragma unroll
  for (unsigned i = 0; i < 16; ++i) {
    if (threadIdx.x == i) table.values[i] = source.values[i];
  }
}

// table[index]. With QKERN_CODEC_SELECT every entry is read and one is kept: no address depends on
// data then, which is what provers of race-freedom can follow.
template <typename T>
QKERN_DEVICE T look_up(const T* table, unsigned count, unsigned index) {
#ifdef QKERN_CODEC_SELECT
  T value = table[0];
#pragma unroll 16
  for (unsigned i = 1; i < count; ++i) {
    // Volatile, or the compiler makes a load at table[index] of it again.
    const T entry = static_cast<const volatile T*>(table)[i];
    value = index == i ? entry : value;
  }
  return value;
#else
  (void)count;
  return table[index];
#endif
}

// Sixteen words lie in sixteen banks and equal addresses are one access: no look-up conflicts,
// whatever the codes.
QKERN_DEVICE float code_value(const CodeTable& table, unsigned code) {
  return look_up(table.values, 16, code);
}

// Whether a load from shared memory multiplies its index by four at no cost.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kIndexShift = 0;
#else
constexpr int kIndexShift = 2;
#endif

// The eight codes of a word as indices of a CodeTable, or as offsets in bytes: four at a time are
// shifted and masked, so that each costs one byte-permute more.
struct WordCodes {
  std::uint32_t first;   // of elements 0, 2, 4, 6: the high nibbles of the bytes
  std::uint32_t second;  // of elements 1, 3, 5, 7

  QKERN_DEVICE explicit WordCodes(std::uint32_t word)
      : first((word >> (4 - kIndexShift)) & (0x0f0f0f0fu << kIndexShift)),
        second((word << kIndexShift) & (0x0f0f0f0fu << kIndexShift)) {}

  QKERN_DEVICE float value(const CodeTable& table, int i) const {
    // Byte i / 2, zeros above.
    const unsigned index = __byte_perm(i % 2 == 0 ? first : second, 0, 0x4440u + i / 2);
#ifdef QKERN_CODEC_SELECT
    return code_value(table, index >> kIndexShift);
#else
    const auto* const bytes = reinterpret_cast<const unsigned char*>(table.values);
    return *reinterpret_cast<const float*>(bytes + (index << (2 - kIndexShift)));
#endif
  }
};

QKERN_DEVICE unsigned packed_code(const std::uint8_t* packed, std::int64_t element) {
  return (packed[element >> 1] >> ((element & 1) != 0 ? 0 : 4)) & 15u;
}

// Scales, float32 or double-quantised.

struct DynamicMap {
  float values[256];
};

constexpr DynamicMap dynamic_map_signed() {
  DynamicMap map{};
  for (int i = 0; i < 256; ++i) map.values[i] = kDynamicMapSigned[i];
  return map;
}

[[maybe_unused]] __device__ const DynamicMap kDeviceMapSigned = dynamic_map_signed();

struct Scales {
  const void* absmax;
  const float* nested_absmax;
  const float* nested_offset;
  int block_shift;
};

inline int log2_of(std::int64_t power) {
  int shift = 0;
  while ((std::int64_t{1} << shift) < power) ++shift;
  return shift;
}

inline Scales scales_of(const Weight4bit& weight) {
  return {weight.absmax, weight.nested_absmax, weight.nested_offset, log2_of(weight.block_size)};
}

// What is added to every double-quantised scale; kernels load it once.
QKERN_DEVICE float load_nested_offset(const Scales& scales) {
  return scales.nested_offset == nullptr ? 0.0f : __ldg(scales.nested_offset);
}

// What of a block's scale comes from memory that no cache may hold. A kernel that has other work
// fetches before it and finishes after it.
struct FetchedScale {
  unsigned bits;        // of the scale, or the code that stands for it
  float nested_absmax;  // of a double-quantised one
};

QKERN_DEVICE FetchedScale fetch_scale(const Scales& scales, std::int64_t element) {
  const std::int64_t block = element >> scales.block_shift;
  if (scales.nested_absmax != nullptr) {
    return {__ldg(static_cast<const std::uint8_t*>(scales.absmax) + block),
            __ldg(scales.nested_absmax + (block >> 8))};
  }
  return {__float_as_uint(__ldg(static_cast<const float*>(scales.absmax) + block)), 0.0f};
}

// Two roundings where the scale is double-quantised, never a fused multiply-add.
QKERN_DEVICE float finish_scale(const Scales& scales, float nested_offset,
                                const FetchedScale& fetched) {
  if (scales.nested_absmax == nullptr) return __uint_as_float(fetched.bits);
  const float value = __ldg(address_of(kDeviceMapSigned.values, fetched.bits));
  return __fadd_rn(__fmul_rn(value, fetched.nested_absmax), nested_offset);
}

// The scale of an element.
QKERN_DEVICE float load_scale(const Scales& scales, float nested_offset, std::int64_t element) {
  return finish_scale(scales, nested_offset, fetch_scale(scales, element));
}

// The scales of a run of weights, by 32-bit positions: 64-bit indices would cost a hot loop more
// instructions than the loads do. A position counts elements from the start of the 256 blocks,
// those of one nested scale, among which the run begins; `first` is that of the run's first
// element.
struct ScaleRun {
  const unsigned char* absmax;  // of those blocks: float32, or codes of a byte
  const float* nested_absmax;
  unsigned first;

  QKERN_DEVICE void start(const Scales& scales, std::int64_t element) {
    const std::int64_t group = element >> (scales.block_shift + 8);
    const bool nested = scales.nested_absmax != nullptr;
    absmax = static_cast<const unsigned char*>(scales.absmax) + group * (nested ? 256 : 4 * 256);
    nested_absmax = nested ? scales.nested_absmax + group : nullptr;
    first = static_cast<unsigned>(element - (group << (scales.block_shift + 8)));
  }
};

// `out[i]` is of the scale at `positions[i]`: one branch for all.
template <int kCount>
QKERN_DEVICE void fetch_scales(const Scales& scales, const ScaleRun& run,
                               const unsigned (&positions)[kCount], FetchedScale (&out)[kCount]) {
  if (scales.nested_absmax != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const unsigned block = positions[i] >> scales.block_shift;
      out[i] = {__ldg(run.absmax + block), __ldg(run.nested_absmax + (block >> 8))};
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const unsigned block = positions[i] >> scales.block_shift;
    out[i] = {__float_as_uint(__ldg(reinterpret_cast<const float*>(run.absmax) + block)), 0.0f};
  }
}

template <int kCount>
QKERN_DEVICE void finish_scales(const Scales& scales, float nested_offset,
                                const FetchedScale (&fetched)[kCount], float (&out)[kCount]) {
  if (scales.nested_absmax != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = __ldg(address_of(kDeviceMapSigned.values, fetched[i].bits));
      out[i] = __fadd_rn(__fmul_rn(value, fetched[i].nested_absmax), nested_offset);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = __uint_as_float(fetched[i].bits);
}

// Decoding to 16 bits by byte permutes: the sixteen products value * scale, each rounded once,
// as two planes of bytes in eight registers. A permute takes nibbles as selectors, so four packed
// codes are looked up at once and no memory is touched.
template <typename T>
struct ScaledTable {
  std::uint32_t low[4];   // low bytes of products 4i...4i+3
  std::uint32_t high[4];  // high bytes

  QKERN_DEVICE void fill(const CodeTable& table, float scale) {
    if constexpr (std::is_same_v<T, BFloat16> && !kRoundsToBFloat16) {
      // Values are finite, so it takes an infinite scale or a NaN to make a NaN.
      if (magnitude_bits(scale) >= kInfBits) {
        fill_by(table, scale, pack_pair<T>);
        return;
      }
    }
    fill_by(table, scale, pack_numbers<T>);
  }

  template <typename Pack>
  QKERN_DEVICE void fill_by(const CodeTable& table, float scale, const Pack& pack) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t first = pack(__fmul_rn(table.values[4 * i + 0], scale),
                                       __fmul_rn(table.values[4 * i + 1], scale));
      const std::uint32_t second = pack(__fmul_rn(table.values[4 * i + 2], scale),
                                        __fmul_rn(table.values[4 * i + 3], scale));
      low[i] = __byte_perm(first, second, 0x6420);
      high[i] = __byte_perm(first, second, 0x7531);
    }
  }

  // Byte i of the result is the plane's byte for nibble i of the selectors' low half. `index` has
  // the codes' lower three bits; `side` picks, for each, the lower or upper eight entries.
  QKERN_DEVICE static std::uint32_t pick(const std::uint32_t (&plane)[4], std::uint32_t index,
                                         std::uint32_t side) {
    const std::uint32_t lower = permute_bytes(plane[0], plane[1], index);
    const std::uint32_t upper = permute_bytes(plane[2], plane[3], index);
    return permute_bytes(lower, upper, side);
  }

  // out[i] holds elements 2i (low half) and 2i + 1 of the word's eight.
  QKERN_DEVICE void decode8(std::uint32_t word, std::uint32_t (&out)[4]) const {
    // Nibbles 0 and 1 are elements 1 and 0: the interleaving swaps them back.
    decode<0x4051, 0x6273>(word, out);
  }

  // out[i] holds elements i (low half) and 4 + i.
  QKERN_DEVICE void decode8_apart(std::uint32_t word, std::uint32_t (&out)[4]) const {
    decode<0x7351, 0x6240>(__byte_perm(word, 0, 0x3120), out);
  }

  // out[i] holds elements 2i (low half) and 2i + 1 of the four in the word's low half.
  QKERN_DEVICE void decode4(std::uint32_t word, std::uint32_t (&out)[2]) const {
    decode_half<0x4051, 0x6273>(word & 0x77777777u, ((word >> 1) & 0x44444444u) | 0x32103210u, out);
  }

  // out[2i] and out[2i + 1] hold the products of the codes that the nibbles of half i name; the
  // selectors say which, of four low and four high bytes.
  template <unsigned kFirst, unsigned kSecond>
  QKERN_DEVICE void decode(std::uint32_t word, std::uint32_t (&out)[4]) const {
    const std::uint32_t index = word & 0x77777777u;
    const std::uint32_t side = ((word >> 1) & 0x44444444u) | 0x32103210u;
    std::uint32_t halves[2][2];
    decode_half<kFirst, kSecond>(index, side, halves[0]);
    decode_half<kFirst, kSecond>(index >> 16, side >> 16, halves[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = halves[i / 2][i % 2];
  }

  template <unsigned kFirst, unsigned kSecond>
  QKERN_DEVICE void decode_half(std::uint32_t index, std::uint32_t side,
                                std::uint32_t (&out)[2]) const {
    const std::uint32_t low_bytes = pick(low, index, side);
    const std::uint32_t high_bytes = pick(high, index, side);
    out[0] = __byte_perm(low_bytes, high_bytes, kFirst);
    out[1] = __byte_perm(low_bytes, high_bytes, kSecond);
  }
};

// Host: run time to compile time.

// Calls fn(T{}) with the storage type of `dtype`.
template <typename Fn>
Status with_dtype(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(BFloat16{});
    case DType::kFloat16:
      return fn(Float16{});
    default:
      return fn(float{});
  }
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Blocks of a grid whose threads stride over the work: enough for any GPU, within its limits.
inline dim3 strided_grid(std::int64_t blocks) {
  constexpr std::int64_t kMaxBlocks = 1 << 20;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

}  // namespace
}  // namespace qkern::cuda
