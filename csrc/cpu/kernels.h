// The bodies of all kernels, for one instruction set; see isa_*.cpp.
#pragma once

#include <cstdint>

#include "kernels_dense.h"
#include "kernels_elementwise.h"
#include "kernels_int8.h"
#include "kernels_optim.h"
#include "kernels_panel.h"
#include "kernels_tiled.h"
#include "kernels_vector.h"
#include "kernels_vector_dx.h"
#include "qkern/ops.h"

namespace qkern::cpu {
namespace {

inline int useful_threads(const Linear4bitArgs& args, int num_threads) {
  return useful_threads(args.m * args.weight.rows * args.weight.cols, num_threads);
}

// Whether every nonzero |x| of a row, times `factor`, lies between the bounds.
template <typename T>
bool rows_in_range(const Linear4bitArgs& args, std::int64_t length, float factor, float least,
                   float most) {
  for (std::int64_t r = 0; r < args.m && length > 0; ++r) {
    const T* row = static_cast<const T*>(args.x) + r * args.x_row_stride;
    const float largest = block_absmax(row, length) * factor;
    if (largest != 0.0f && !(largest > least && largest < most)) return false;
  }
  return true;
}

// The kernels for few rows multiply in another order, which leaves the range of float32 where the
// factors lie at its opposite ends: forward sums unscaled products, dx scales dy before the codes.
// Such x take the tiled path.
template <typename T>
bool products_stay_in_range(const Linear4bitArgs& args) {
  const float largest_code = block_absmax(code_values(args.weight.codes), 16);
  return rows_in_range<T>(args, args.weight.cols, largest_code, 0x1p-60f, 0x1p100f);
}

template <typename T>
bool gradients_stay_in_range(const Linear4bitArgs& args) {
  return rows_in_range<T>(args, args.weight.rows, 1.0f, 0.0f, 0x1p20f);
}

// The tiled path sums in an order that does not depend on the number of rows.
inline bool takes_vector_path(const Linear4bitArgs& args, std::int64_t most_rows) {
  return args.m <= most_rows && !args.batch_invariant && args.added.rank == 0 &&
         rows_are_blocks(args.weight);
}

template <typename Engine, typename T>
Status linear_4bit(const Linear4bitArgs& args, int num_threads) {
  static_assert(Engine::kVectorRows <= kMaxVectorRows && Engine::kVectorRowsDx <= kMaxVectorRows);
  num_threads = useful_threads(args, num_threads);
  return takes_vector_path(args, Engine::kVectorRows) && products_stay_in_range<T>(args)
             ? VectorTable<ForwardVector, T, kMaxVectorRows>::run(args, num_threads)
             : linear_tiled<Engine, T, true>(args, num_threads);
}

template <typename Engine, typename T>
Status linear_4bit_dx(const Linear4bitArgs& args, int num_threads) {
  num_threads = useful_threads(args, num_threads);
  return takes_vector_path(args, Engine::kVectorRowsDx) && gradients_stay_in_range<T>(args)
             ? VectorTable<DxVector, T, kMaxVectorRows>::run(args, num_threads)
             : linear_tiled<Engine, T, false>(args, num_threads);
}

}  // namespace
}  // namespace qkern::cpu
