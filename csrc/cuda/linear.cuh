// What the matmul files share: the paths and the sum over a split contraction.
#pragma once

#include "codec.cuh"

namespace qkern::cuda {

// A contraction cut into `count` parts of `length` each (the last may be shorter), one per grid.z.
// Their sums go to the workspace as float32 [count][m][columns] and are added in order.
struct Split {
  int count;
  std::int64_t length;
};

// Rows of x that linear_vector takes at a time, so that its workspace stays small.
constexpr std::int64_t kVectorLaunchRows = 64;

// The paths. Each has the whole args and writes y; `split` is what its workspace was sized for.
Status linear_vector(const Linear4bitArgs& args, const Split& split, void* stream);
Status linear_mma(const Linear4bitArgs& args, const Split& split, void* stream);
Status linear_dx_mma(const Linear4bitArgs& args, const Split& split, void* stream);
Status linear_tiled(const Linear4bitArgs& args, bool input_gradient, void* stream);

// y = sum of the parts + bias, rounded once to T.
Status sum_splits(const Linear4bitArgs& args, int parts, std::int64_t columns, void* stream);

Split linear_vector_split(const Linear4bitArgs& args);
Split linear_mma_split(const Linear4bitArgs& args);
Split linear_dx_mma_split(const Linear4bitArgs& args);

namespace {

// Parts so that about `wanted` blocks run where `blocks` would, of a multiple of `step` each.
inline Split split_for(std::int64_t length, std::int64_t step, std::int64_t blocks,
                       std::int64_t wanted, int max_parts) {
  const std::int64_t steps = ceil_div(length, step);
  std::int64_t parts = wanted / blocks;
  if (parts > max_parts) parts = max_parts;
  if (parts > steps) parts = steps;
  if (parts < 1) parts = 1;
  const std::int64_t part_steps = ceil_div(steps, parts);
  return {static_cast<int>(ceil_div(steps, part_steps)), part_steps * step};
}

// Eight neighbouring results of a row, from `column`; those at or past `columns` do not exist.
template <typename T>
QKERN_DEVICE void store8(const float (&values)[8], T* row, std::int64_t column,
                         std::int64_t columns, bool aligned) {
  static_assert(sizeof(T) == 2, "16 bytes are eight values");
  if (aligned && column + 8 <= columns) {
    store_global16(row + column, uint4{pack_pair<T>(values[0], values[1]),
                                       pack_pair<T>(values[2], values[3]),
                                       pack_pair<T>(values[4], values[5]),
                                       pack_pair<T>(values[6], values[7])});
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < columns) row[column + i] = from_float<T>(values[i]);
  }
}

}  // namespace
}  // namespace qkern::cuda
