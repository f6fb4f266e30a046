// quantize_8bit and dequantize_8bit: a byte a value, against a map of 256.
#include "blockwise.cuh"

namespace qkern::cuda {
namespace {

template <typename T>
QKERN_KERNEL(kQuantizeThreads, 1)
quantize_8bit_kernel(const T* __restrict__ x, BlockPlan plan, const float* __restrict__ map,
                     std::uint8_t* __restrict__ codes, float* __restrict__ absmax) {
  QKERN_SHARED(ByteThresholds, thresholds);
  stage_thresholds(map, thresholds);
  __syncthreads();
  const TensorValues<T> input{x, plan.numel, is_aligned16(x)};
  const ByteEncoder encoder{thresholds.values, codes, is_aligned16(codes)};
  quantize_blocks(plan, input, encoder, absmax);
}

// Values that a thread stores at once.
template <typename T>
constexpr int kStoreValues = 16 / static_cast<int>(sizeof(T));

template <typename T>
QKERN_KERNEL(kQuantizeThreads, 1)
dequantize_8bit_kernel(const std::uint8_t* __restrict__ codes, const float* __restrict__ absmax,
                       const float* __restrict__ map, int block_shift, std::int64_t numel,
                       T* __restrict__ out) {
  QKERN_SHARED(DynamicMap, table);
  for (unsigned i = threadIdx.x; i < 256; i += kQuantizeThreads) table.values[i] = map[i];
  __syncthreads();
  constexpr int kValues = kStoreValues<T>;
  const bool aligned = is_aligned16(codes) && is_aligned16(out);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kQuantizeThreads * kValues;
  for (std::int64_t start =
           (static_cast<std::int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x) * kValues;
       start < numel; start += stride) {
    const float scale = __ldg(absmax + (start >> block_shift));
    if (aligned && start + kValues <= numel) {
      std::uint32_t words[2];
      words[0] = __ldg(reinterpret_cast<const std::uint32_t*>(codes + start));
      if constexpr (kValues == 8) {
        words[1] = __ldg(reinterpret_cast<const std::uint32_t*>(codes + start) + 1);
      }
      float values[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        values[i] =
            __fmul_rn(look_up(table.values, 256, (words[i / 4] >> (8 * (i % 4))) & 255u), scale);
      }
      std::uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kValues == 8) {
          bits[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
        } else {
          bits[i] = __float_as_uint(values[i]);
        }
      }
      store_global16(out + start, uint4{bits[0], bits[1], bits[2], bits[3]});
    } else {
      for (std::int64_t i = start; i < start + kValues && i < numel; ++i) {
        out[i] = from_float<T>(__fmul_rn(look_up(table.values, 256, codes[i]), scale));
      }
    }
  }
}

}  // namespace

Status quantize_8bit(const Quantize8bitArgs& args, void* stream) {
  if (args.numel == 0) return Status::success();
  const BlockPlan plan = block_plan(args.numel, args.block_size);
  const LaunchConfig config{quantize_grid(plan), kQuantizeThreads, 0, stream};
  return with_dtype(args.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch("quantize_8bit_kernel", quantize_8bit_kernel<T>, config,
                  static_cast<const T*>(args.x), plan, args.map, args.codes, args.absmax);
  });
}

Status dequantize_8bit(const Dequantize8bitArgs& args, void* stream) {
  if (args.numel == 0) return Status::success();
  return with_dtype(args.out_dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::int64_t blocks = ceil_div(args.numel, kQuantizeThreads * kStoreValues<T>);
    const LaunchConfig config{strided_grid(blocks), kQuantizeThreads, 0, stream};
    return launch("dequantize_8bit_kernel", dequantize_8bit_kernel<T>, config, args.codes,
                  args.absmax, args.map, log2_of(args.block_size), args.numel,
                  static_cast<T*>(args.out));
  });
}

}  // namespace qkern::cuda
