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
#include "kernels_vector_dx.h"

namespace qkern::cpu {
namespace {

// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr std::int64_t kSerialWork = std::int64_t{1} << 16;

inline int useful_threads(const Linear4bitArgs& args, int num_threads) {
  const std::int64_t work = args.m * args.weight.rows * args.weight.cols;
  return work < kSerialWork ? 1 : num_threads;
}

// The kernel for few rows of x sums unscaled products, which leave the range of float32 where x and
// the scale lie at its opposite ends. Such x take the tiled path.
template <typename T>
bool products_stay_in_range(const Linear4bitArgs& args) {
  const float* codes = code_values(args.weight.codes);
  const float largest_code = block_absmax(codes, 16);
  for (std::int64_t r = 0; r < args.m; ++r) {
    const T* row = static_cast<const T*>(args.x) + r * args.x_row_stride;
    if (args.weight.cols == 0) return true;
    const float largest = block_absmax(row, args.weight.cols) * largest_code;
    if (largest != 0.0f && !(largest > 0x1p-60f && largest < 0x1p100f)) return false;
  }
  return true;
}

// The tiled path sums in an order that does not depend on the number of rows.
inline bool takes_vector_path(const Linear4bitArgs& args, std::int64_t most_rows) {
  return args.m <= most_rows && !args.batch_invariant && rows_are_blocks(args.weight);
}

template <typename Engine, typename T>
Status linear_4bit(const Linear4bitArgs& args, int num_threads) {
  num_threads = useful_threads(args, num_threads);
  return takes_vector_path(args, kMaxVectorRows) && products_stay_in_range<T>(args)
             ? VectorTable<ForwardVector, T, kMaxVectorRows>::run(args, num_threads)
             : linear_tiled<Engine, T, true>(args, num_threads);
}

template <typename Engine, typename T>
Status linear_4bit_dx(const Linear4bitArgs& args, int num_threads) {
  num_threads = useful_threads(args, num_threads);
  return takes_vector_path(args, kMaxVectorRows)
             ? VectorTable<DxVector, T, kMaxVectorRows>::run(args, num_threads)
             : linear_tiled<Engine, T, false>(args, num_threads);
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
