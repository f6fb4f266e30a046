// 8-bit moments: the dynamic maps' tables in shared memory, and how they decode and encode.
#pragma once

#include "blockwise.cuh"

namespace qkern::cuda {
namespace {

// Encodes by two look-ups and one comparison, where counting the thresholds below t takes eight of
// each. Magnitudes that agree in all but their lowest bits are a bucket; an octave has
// 2^kPartBits of them. Each holds a threshold at most, so that t has the code of the bucket's
// smallest magnitude or the next. kZero is the code of 0; a map without negative values has it 0.
template <int kPartBits_, int kOctaves_, int kZero_>
struct MapTables {
  static constexpr int kPartBits = kPartBits_;
  static constexpr int kOctaves = kOctaves_;
  static constexpr int kZero = kZero_;
  static constexpr int kShift = 23 - kPartBits;
  static constexpr int kBuckets = (kOctaves << kPartBits) + 1;  // [2^-kOctaves, 1), then 1
  static constexpr unsigned kFirst = (127u - kOctaves) << kPartBits;

  float values[256];
  float thresholds[256];                          // below each code; below the first, of no t
  std::uint8_t ranks[(kBuckets + 15) / 16 * 16];  // positive thresholds below a bucket

  // Of a t that |t| <= 1 holds for, but for the error of a product.
  QKERN_DEVICE unsigned encode(float t) const {
    const float smallest = __uint_as_float(kFirst << kShift);
    const float magnitude = fmaxf(kZero == 0 ? t : fabsf(t), smallest);
    int code = ranks[(__float_as_uint(magnitude) >> kShift) - kFirst];
    if constexpr (kZero != 0) code ^= __float_as_int(t) >> 31;  // t < 0: -1 - code
    code += kZero;
    return static_cast<unsigned>(code + (t > thresholds[code + 1] ? 1 : 0));
  }
};

// The tables of an ascending map and of the midpoints of its neighbours, rounded down.
template <typename Tables>
constexpr Tables map_tables(const float (&map)[256], const float (&thresholds)[255]) {
  Tables tables{};
  for (int i = 0; i < 256; ++i) tables.values[i] = map[i];
  tables.thresholds[0] = -2.0f;
  for (int i = 0; i < 255; ++i) tables.thresholds[i + 1] = thresholds[i];
  constexpr int kParts = 1 << Tables::kPartBits;
  float octave = 1.0f;
  for (int i = 0; i < Tables::kOctaves; ++i) octave /= 2.0f;
  int rank = 0;
  for (int bucket = 0; bucket < Tables::kBuckets; ++bucket) {
    const int part = bucket % kParts;
    if (bucket > 0 && part == 0) octave *= 2.0f;
    const float smallest = octave * (1.0f + static_cast<float>(part) / kParts);
    while (Tables::kZero + rank < 254 && thresholds[Tables::kZero + rank] < smallest) ++rank;
    tables.ranks[bucket] = static_cast<std::uint8_t>(rank);
  }
  return tables;
}

struct alignas(16) MomentTables {
  using Signed = MapTables<6, 22, 127>;
  using Unsigned = MapTables<7, 23, 0>;

  Signed exp_avg;
  Unsigned exp_avg_sq;
};

constexpr MomentTables moment_tables() {
  return {map_tables<MomentTables::Signed>(kDynamicMapSigned, kDynamicThresholdsSigned),
          map_tables<MomentTables::Unsigned>(kDynamicMapUnsigned, kDynamicThresholdsUnsigned)};
}

__device__ const MomentTables kDeviceMomentTables = moment_tables();

// All of kThreads threads call it; the caller synchronises.
template <int kThreads>
QKERN_DEVICE void stage_tables(MomentTables& tables) {
  constexpr unsigned kPieces = sizeof(MomentTables) / sizeof(uint4);
  const auto* const from = reinterpret_cast<const uint4*>(&kDeviceMomentTables);
  auto* const to = reinterpret_cast<uint4*>(&tables);
  for (unsigned i = threadIdx.x; i < kPieces; i += kThreads) to[i] = load_global16(from + i);
}

// Encodes a lane's values of a warp's block; returns the block's scale.
template <typename Tables, int kValues>
QKERN_DEVICE float encode_block(const Tables& tables, const float (&values)[kValues],
                                unsigned (&codes)[kValues]) {
  unsigned largest = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const unsigned bits = magnitude_bits(values[i]);
    largest = bits > largest ? bits : largest;
  }
  const float absmax = absmax_from_bits(warp_max(largest));
  const float reciprocal = block_reciprocal(absmax);
  if (magnitude_bits(reciprocal) < kInfBits) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) codes[i] = tables.encode(__fmul_rn(values[i], reciprocal));
  } else {
    // A NaN, or of a subnormal scale: products are infinite or NaNs, which have no bucket.
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      codes[i] = __fmul_rn(values[i], reciprocal) > 0.0f ? 255 : 0;
    }
  }
  return absmax;
}

}  // namespace
}  // namespace qkern::cuda
