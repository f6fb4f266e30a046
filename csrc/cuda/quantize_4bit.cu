// quantize_4bit: blocks of 32...16384 values to 4-bit codes and a float32 absmax each.
#include "blockwise.cuh"

namespace qkern::cuda {
namespace {

// nf4's and a custom codebook's values ascend as float32 midpoints; fp4 is a sign and the nearest
// of eight magnitudes.
struct EncodeTable {
  float thresholds[16];  // 15 (fp4: 7) and padding
  unsigned codes[16];    // code of each count of thresholds below the value
};

QKERN_DEVICE void stage_fp4(EncodeTable& table) {
  constexpr float kThresholds[7] = {kFp4MagnitudeMidpoints[0], kFp4MagnitudeMidpoints[1],
                                    kFp4MagnitudeMidpoints[2], kFp4MagnitudeMidpoints[3],
                                    kFp4MagnitudeMidpoints[4], kFp4MagnitudeMidpoints[5],
                                    kFp4MagnitudeMidpoints[6]};
  constexpr unsigned kCodes[8] = {
      kFp4MagnitudeCodes[0], kFp4MagnitudeCodes[1], kFp4MagnitudeCodes[2], kFp4MagnitudeCodes[3],
      kFp4MagnitudeCodes[4], kFp4MagnitudeCodes[5], kFp4MagnitudeCodes[6], kFp4MagnitudeCodes[7]};
#pragma unroll
  for (unsigned i = 0; i < 8; ++i) {
    if (threadIdx.x != i) continue;
    if (i < 7) table.thresholds[i] = kThresholds[i];
    table.codes[i] = kCodes[i];
  }
}

struct SortedRanks {
  unsigned of[16];
};

// A stable sort of sixteen values, one thread each: it finds its value's rank, then fetches the
// value whose rank is its own number, so that no address depends on the values.
QKERN_DEVICE void stage_sorted(const CodeTable& values, SortedRanks& ranks, CodeTable& sorted,
                               EncodeTable& table) {
  const unsigned i = threadIdx.x;
  if (i < 16) {
    const float mine = values.values[i];
    unsigned rank = 0;
#pragma unroll
    for (unsigned j = 0; j < 16; ++j) {
      const float other = values.values[j];
      rank += other < mine || (other == mine && j < i) ? 1 : 0;
    }
    ranks.of[i] = rank;
  }
  __syncthreads();
  if (i < 16) {
    float value = 0.0f;
    unsigned code = 0;
#pragma unroll
    for (unsigned j = 0; j < 16; ++j) {
      const bool here = ranks.of[j] == i;
      value = here ? values.values[j] : value;
      code = here ? j : code;
    }
    sorted.values[i] = value;
    table.codes[i] = code;
  }
  __syncthreads();
  if (i < 15) {
    table.thresholds[i] = __fmul_rn(__fadd_rn(sorted.values[i], sorted.values[i + 1]), 0.5f);
  }
}

template <bool kFp4>
struct NibbleEncoder {
  const EncodeTable& table;
  std::uint8_t* packed;
  bool aligned;

  QKERN_DEVICE unsigned encode(float x, float reciprocal) const {
    const float t = __fmul_rn(x, reciprocal);
    if constexpr (kFp4) {
      const unsigned count = count_below<7>(table.thresholds, fabsf(t));
      const unsigned magnitude = look_up(table.codes, 8, count);
      return magnitude | (x < 0.0f ? 8u : 0u);
    } else {
      return look_up(table.codes, 16, count_below<15>(table.thresholds, t));
    }
  }

  QKERN_DEVICE void store(std::int64_t start, int count, const float (&x)[kLaneValues], float,
                          float reciprocal) const {
    std::uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) word |= encode(x[i], reciprocal) << (4 * (i ^ 1));
    if (aligned && count == kLaneValues) {
      *reinterpret_cast<std::uint32_t*>(packed + start / 2) = word;
    } else {
      // An odd last byte is completed by the code of the zero that was loaded past the end.
#pragma unroll
      for (int i = 0; i < kLaneValues; i += 2) {
        if (i < count) packed[(start + i) / 2] = static_cast<std::uint8_t>(word >> (4 * i));
      }
    }
  }
};

template <typename T, bool kFp4>
QKERN_KERNEL(kQuantizeThreads, 1)
quantize_4bit_kernel(const T* __restrict__ x, BlockPlan plan, CodeSource source,
                     std::uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  QKERN_SHARED(EncodeTable, table);
  if constexpr (kFp4) {
    stage_fp4(table);
  } else {
    QKERN_SHARED(CodeTable, values);
    QKERN_SHARED(CodeTable, sorted);
    QKERN_SHARED(SortedRanks, ranks);
    stage_codes(source, values);
    __syncthreads();
    stage_sorted(values, ranks, sorted, table);
  }
  __syncthreads();
  const TensorValues<T> input{x, plan.numel, is_aligned16(x)};
  const NibbleEncoder<kFp4> encoder{table, packed, is_aligned16(packed)};
  quantize_blocks(plan, input, encoder, absmax);
}

}  // namespace

Status quantize_4bit(const Quantize4bitArgs& args, void* stream) {
  if (args.numel == 0) return Status::success();
  const BlockPlan plan = block_plan(args.numel, args.block_size);
  const LaunchConfig config{quantize_grid(plan), kQuantizeThreads, 0, stream};
  return with_dtype(args.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = args.codes.format == kFormatFp4 ? quantize_4bit_kernel<T, true>
                                                        : quantize_4bit_kernel<T, false>;
    return launch("quantize_4bit_kernel", kernel, config, static_cast<const T*>(args.x), plan,
                  code_source(args.codes), args.packed, args.absmax);
  });
}

}  // namespace qkern::cuda
