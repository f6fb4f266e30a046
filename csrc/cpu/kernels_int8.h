// y = x W^T + bias for a few rows of x, with x in 8 bits and the codes' values in 8 bits: on
// request only, for it is less exact. A group of 32 elements of x shares a scale.
#pragma once

#include <cstdint>

#include "kernels_vector.h"

namespace qkern::cpu {
namespace {

constexpr float kMostByte = 127.0f;

// The codes' values times a factor, as integers.
struct ByteCodes {
  float factor;
  Simd::ByteLut integers;

  explicit ByteCodes(const Codebook& codes) {
    const float* values = code_values(codes);
    factor = codes.format == kFormatNf4   ? kInt8FactorNf4
             : codes.format == kFormatFp4 ? kInt8FactorFp4
                                          : kMostByte / block_absmax(values, 16);
    std::int8_t table[16];
    for (int i = 0; i < 16; ++i) {
      const float scaled = values[i] * factor;
      const int integer = static_cast<int>(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f);
      // What AVX-512 with VNNI takes as unsigned is 128 larger.
      table[i] = static_cast<std::int8_t>(Simd::kByteSums ? integer ^ -128 : integer);
    }
    integers = Simd::make_byte_lut(table);
  }
  const Simd::ByteLut& lut() const { return integers; }
};

// Partial sums of kStreams rows of W with kRows rows of x, as VectorKernel's. A word's eight codes
// are the bytes of one lane: the low ones first, which are its odd elements. The order of
// additions does not depend on kRows.
template <int kRows, int kStreams>
struct Int8Kernel {
  using Codes = ByteCodes;

  // A chunk is one addition, so one chain takes a whole segment.
  static constexpr std::int64_t kChainChunks = kVectorPanelFloats / kChunk;
  // Of a chunk of a row of x: the low codes' elements and the high ones' in bytes, perhaps sums of
  // each lane's, and the lanes' scales.
  static constexpr std::int64_t kXScales = (Simd::kByteSums ? 3 : 2) * kLanes;
  static constexpr std::int64_t kXRow = kXScales + kLanes;
  static constexpr std::int64_t kXChunk = kRows * kXRow;
  static constexpr int kPlannedRows = kMaxVectorRows;
  static constexpr std::int64_t kXFloats =
      kXRow;  // eight rows are read from the next cache in time
  static_assert(kXRow <= kChunk, "takes no more room than x in float32");

  static constexpr int best_streams() { return kRows == 1 ? 2 : 1; }

  template <typename T>
  static void place_row(const T* x, const Codes& codes, const Segment& segment, int r, float* out) {
    // The codes' factor goes into the scales of x, so that sums are never larger than they mean.
    const float unit = kMostByte * codes.factor;
    constexpr int kHalf = kGroup / 2;
    constexpr int kGroupLanes = kGroup / kWordCodes;
    for (std::int64_t c = 0; c < segment.chunks; ++c) {
      float* to = out + c * kXChunk + r * kXRow;
      auto* low = reinterpret_cast<signed char*>(to);
      signed char* high = low + 4 * kLanes;
      for (int g = 0; g < kChunk / kGroup; ++g) {
        float values[kGroup] = {};
        const std::int64_t at = c * kChunk + g * kGroup;
        if (at < segment.length) convert_row(x + at, kGroup, values);
        const float largest = block_absmax(values, kGroup);
        const bool counts = largest > kLeastMagnitude;  // below are zeros alone: see rows_in_8_bits
        const float factor = counts ? kMostByte / largest : 0.0f;
        int integers[kGroup];
        for (int i = 0; i < kGroup; ++i) {
          constexpr float kRound = 0x1.8p23f;  // floats near it are integers
          integers[i] = static_cast<int>(values[i] * factor + kRound - kRound);
        }
        for (int i = 0; i < kHalf; ++i) {
          low[g * kHalf + i] = static_cast<signed char>(integers[2 * i + 1]);
          high[g * kHalf + i] = static_cast<signed char>(integers[2 * i]);
        }
        for (int p = 0; p < kGroupLanes; ++p) {
          to[kXScales + g * kGroupLanes + p] = counts ? largest / unit : 0.0f;
          if (!Simd::kByteSums) continue;
          std::int32_t sum = 0;
          for (int i = 0; i < kWordCodes; ++i) sum += integers[p * kWordCodes + i];
          sum *= -128;
          std::memcpy(to + 2 * kLanes + g * kGroupLanes + p, &sum, sizeof(sum));
        }
      }
    }
  }

  Simd::F total[kStreams][kRows];

  __attribute__((always_inline)) void add(const Simd::I (&words)[kStreams],
                                          const Simd::ByteLut& lut, const float* x, const Segment&,
                                          const Simd::F (&scale)[kStreams]) {
    Simd::Bytes w[kStreams];
    for (int s = 0; s < kStreams; ++s) w[s] = Simd::decode_bytes(lut, words[s]);
    for (int r = 0; r < kRows; ++r) {
      const Simd::F x_scale = Simd::loadu(x + r * kXRow + kXScales);
      for (int s = 0; s < kStreams; ++s) {
        const Simd::F product = Simd::mul(Simd::dot_bytes(w[s], x + r * kXRow), x_scale);
        total[s][r] = Simd::fma(product, scale[s], total[s][r]);
      }
    }
  }
};

// How many rows of x, from the first on, are in a range where neither scales nor sums leave
// float32's, at most as many as linear_4bit_int8 takes.
template <typename T>
std::int64_t rows_in_8_bits(const Linear4bitArgs& args) {
  std::int64_t r = 0;
  for (; r < min64(args.m, kMaxVectorRows); ++r) {
    const T* row = static_cast<const T*>(args.x) + r * args.x_row_stride;
    const float largest = block_absmax(row, args.weight.cols);
    if (largest != 0.0f && !(largest > 0x1p-60f && largest < 0x1p80f)) break;
    bool kept = true;  // each group's scale
    for (std::int64_t k = 0; k < args.weight.cols; k += kGroup) {
      const float least = block_absmax(row + k, kGroup);
      kept = kept && (least == 0.0f || least > kLeastMagnitude);
    }
    if (!kept) break;
  }
  return r;
}

template <typename T, int kRows>
using ForwardInt8 = ForwardVectorBy<T, kRows, Int8Kernel>;

template <typename T>
Status linear_4bit_int8(const Linear4bitArgs& args, int num_threads) {
  return VectorTable<ForwardInt8, T, kMaxVectorRows>::run(args, num_threads);
}

}  // namespace
}  // namespace qkern::cpu
