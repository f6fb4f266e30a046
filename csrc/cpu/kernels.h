// All kernels of one instruction set; see isa_*.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "kernel_table.h"
#include "parallel.h"
#include "qkern/codes.h"
#include "qkern/ops.h"
#include "scratch.h"

#include "kernels_elementwise.h"
#include "kernels_tiled.h"
#include "kernels_vector.h"

namespace qkern::cpu {
namespace {

// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr std::int64_t kSerialWork = std::int64_t{1} << 16;

inline int useful_threads(const Linear4bitArgs& args, int num_threads) {
  const std::int64_t work = args.m * args.weight.rows * args.weight.cols;
  return work < kSerialWork ? 1 : num_threads;
}

template <typename Engine, typename T>
Status linear_4bit(const Linear4bitArgs& args, int num_threads) {
  num_threads = useful_threads(args, num_threads);
  // The tiled path sums in an order that does not depend on the number of rows.
  const bool vector =
      args.m <= kMaxVectorRows && !args.batch_invariant && rows_are_blocks(args.weight);
  return vector ? VectorTable<T, kMaxVectorRows>::run(args, num_threads)
                : linear_tiled<Engine, T, true>(args, num_threads);
}

template <typename Engine, typename T>
Status linear_4bit_dx(const Linear4bitArgs& args, int num_threads) {
  return linear_tiled<Engine, T, false>(args, useful_threads(args, num_threads));
}

constexpr KernelTable kKernels = {
    Simd::kName,
    {quantize_4bit<float>, quantize_4bit<BFloat16>, quantize_4bit<Float16>},
    {dequantize_4bit<float>, dequantize_4bit<BFloat16>, dequantize_4bit<Float16>},
    {quantize_8bit<float>, quantize_8bit<BFloat16>, quantize_8bit<Float16>},
    {dequantize_8bit<float>, dequantize_8bit<BFloat16>, dequantize_8bit<Float16>},
    {linear_4bit<FloatEngine, float>, linear_4bit<FloatEngine, BFloat16>,
     linear_4bit<FloatEngine, Float16>},
    {linear_4bit_dx<FloatEngine, float>, linear_4bit_dx<FloatEngine, BFloat16>,
     linear_4bit_dx<FloatEngine, Float16>},
};

}  // namespace
}  // namespace qkern::cpu
