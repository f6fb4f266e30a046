// The part that all quantisers share: walk flat blocks by warps, find each block's absmax, hand
// scaled values to an encoder. The rule (NaN, zeros, subnormals) is that of qkern/reference.py.
#pragma once

#include <cmath>

#include "codec.cuh"

namespace qkern::cuda {
namespace {

constexpr int kQuantizeThreads = 256;
constexpr int kLaneValues = 8;
constexpr int kWarpValues = kLaneValues * kWarp;
constexpr unsigned kQuietNanBits = 0x7fc00000u;

QKERN_DEVICE float absmax_from_bits(unsigned largest) {
  return __uint_as_float(largest >= kInfBits ? kQuietNanBits : largest);
}

// 1 / absmax, IEEE; 0 for a block of zeros, which sends every scaled value to 0.
QKERN_DEVICE float block_reciprocal(float absmax) {
  return absmax == 0.0f ? 0.0f : __frcp_rn(absmax);
}

// Eight values from `start`, zeros past the end.
template <typename T>
struct TensorValues {
  const T* x;
  std::int64_t numel;
  bool aligned;

  QKERN_DEVICE void load(std::int64_t start, float (&out)[kLaneValues]) const {
    if (aligned && start + kLaneValues <= numel) {
      load_global8(x + start, out);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        out[i] = start + i < numel ? to_float<T>(x[start + i]) : 0.0f;
      }
    }
  }
};

// How a launch is divided: a warp takes a unit, which is a whole number of blocks and of passes
// over the warp's 256 values.
struct BlockPlan {
  std::int64_t numel;
  std::int64_t units;
  int block_shift;
  int passes;       // of the warp over a unit
  int block_lanes;  // lanes that share a block in a pass
};

inline BlockPlan block_plan(std::int64_t numel, std::int64_t block_size) {
  const std::int64_t unit = block_size > kWarpValues ? block_size : kWarpValues;
  const std::int64_t lanes = block_size / kLaneValues;
  return {numel, ceil_div(numel, unit), log2_of(block_size), static_cast<int>(unit / kWarpValues),
          static_cast<int>(lanes < kWarp ? lanes : kWarp)};
}

inline dim3 quantize_grid(const BlockPlan& plan) {
  return strided_grid(ceil_div(plan.units, kQuantizeThreads / kWarp));
}

// `values.load(start, out)` gives the input; `encoder.store(start, count, values, absmax,
// reciprocal)` takes eight elements of a block, of which `count` exist.
template <typename Values, typename Encoder>
QKERN_DEVICE void quantize_blocks(const BlockPlan& plan, const Values& values,
                                  const Encoder& encoder, float* absmax) {
  constexpr int kWarps = kQuantizeThreads / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * kWarps;
  const std::int64_t unit_values = static_cast<std::int64_t>(plan.passes) * kWarpValues;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
       unit < plan.units; unit += warps) {
    const std::int64_t mine = unit * unit_values + lane * kLaneValues;
    float x[kLaneValues];
    unsigned largest = 0;
    for (int pass = 0; pass < plan.passes; ++pass) {
      values.load(mine + pass * kWarpValues, x);
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        const unsigned bits = magnitude_bits(x[i]);
        largest = bits > largest ? bits : largest;
      }
    }
    for (int step = 1; step < plan.block_lanes; step *= 2) {
      const unsigned other = __shfl_xor_sync(kAllLanes, largest, step);
      largest = other > largest ? other : largest;
    }
    const float block_absmax = absmax_from_bits(largest);
    if (lane % plan.block_lanes == 0 && mine < plan.numel) {
      absmax[mine >> plan.block_shift] = block_absmax;
    }
    const float reciprocal = block_reciprocal(block_absmax);
    for (int pass = 0; pass < plan.passes; ++pass) {
      const std::int64_t start = mine + pass * kWarpValues;
      if (start >= plan.numel) break;
      // A long block is read again, from the cache, rather than held in registers.
      if (plan.passes > 1) values.load(start, x);
      const std::int64_t left = plan.numel - start;
      encoder.store(start, left < kLaneValues ? static_cast<int>(left) : kLaneValues, x,
                    block_absmax, reciprocal);
    }
  }
}

// The number of ascending thresholds below t; 0 for NaN. kCount + 1 is a power of two.
template <int kCount>
QKERN_DEVICE unsigned count_below(const float* thresholds, float t) {
  unsigned count = 0;
#ifdef QKERN_CODEC_SELECT
  for (unsigned i = 0; i < kCount; ++i) count += t > thresholds[i] ? 1 : 0;
#else
#pragma unroll
  for (unsigned step = (kCount + 1) / 2; step > 0; step /= 2) {
    count += t > thresholds[count + step - 1] ? step : 0;
  }
#endif
  return count;
}

// 8-bit codes of a scaled value: a byte an element.
struct ByteEncoder {
  const float* thresholds;  // [255]
  std::uint8_t* codes;
  bool aligned;

  QKERN_DEVICE void store(std::int64_t start, int count, const float (&x)[kLaneValues], float,
                          float reciprocal) const {
    store_from(0, start, count, x, reciprocal);
  }

  // With `least` in place of smaller codes.
  QKERN_DEVICE void store_from(unsigned least, std::int64_t start, int count,
                               const float (&x)[kLaneValues], float reciprocal) const {
    std::uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const unsigned code = count_below<255>(thresholds, __fmul_rn(x[i], reciprocal));
      words[i / 4] |= (code > least ? code : least) << (8 * (i % 4));
    }
    if (aligned && count == kLaneValues) {
      *reinterpret_cast<uint2*>(codes + start) = uint2{words[0], words[1]};
    } else {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        if (i < count) codes[start + i] = static_cast<std::uint8_t>(words[i / 4] >> (8 * (i % 4)));
      }
    }
  }
};

struct ByteThresholds {
  float values[256];  // 255 and padding
};

// Midpoints of neighbours of an ascending map, rounded down: t > threshold is then exactly
// t > midpoint for every float t. All threads call it; the caller synchronises.
QKERN_DEVICE void stage_thresholds(const float* map, ByteThresholds& thresholds) {
  for (int i = static_cast<int>(threadIdx.x); i < 255; i += kQuantizeThreads) {
    const double exact = (static_cast<double>(map[i]) + static_cast<double>(map[i + 1])) / 2;
    float rounded = static_cast<float>(exact);
    if (static_cast<double>(rounded) > exact) rounded = nextafterf(rounded, -HUGE_VALF);
    thresholds.values[i] = rounded;
  }
}

}  // namespace
}  // namespace qkern::cuda
