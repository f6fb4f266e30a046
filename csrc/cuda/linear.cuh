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

// Products that one accumulator of a tensor core takes at most: it cuts bits off where others
// round, so its error grows with their number. No layer of a known model is longer.
constexpr std::int64_t kLongestChain = 1 << 16;

// Columns of W up to which a lane's offsets to its few rows fit 32 bits.
constexpr std::int64_t kLongestRow = 1 << 29;
static_assert(4 * kLongestRow + kNestedBlockSize * std::int64_t{kMaxBlockSize} < 1ll << 32,
              "positions in a ScaleRun, which starts up to 256 blocks before, fit them too");

// Whether this build has code for sm_90a, which alone has Hopper's products.
#if defined(QKERN_HAVE_SM90A) || defined(QKERN_CUDA_EMULATED)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// The paths. Each has the whole args and writes y; `split` is what its workspace was sized for, and
// `capability` is the device's.
Status linear_vector(const Linear4bitArgs& args, const Split& split, void* stream);
Status linear_mma(const Linear4bitArgs& args, const Split& split, int capability, void* stream);
Status linear_dx_mma(const Linear4bitArgs& args, const Split& split, int capability, void* stream);
Status linear_tiled(const Linear4bitArgs& args, bool input_gradient, void* stream);
Status linear_wgmma(const Linear4bitArgs& args, const Split& split, void* stream);
Status linear_dx_wgmma(const Linear4bitArgs& args, const Split& split, void* stream);

// y = sum of the parts + bias, rounded once to T.
Status sum_splits(const Linear4bitArgs& args, int parts, std::int64_t columns, void* stream);

// The same by experts, whose contractions are not split.
Status grouped_linear_vector(const GroupedLinear4bitArgs& args, void* stream);
Status grouped_linear_mma(const GroupedLinear4bitArgs& args, int capability, void* stream);
Status grouped_linear_dx_mma(const GroupedLinear4bitArgs& args, int capability, void* stream);
Status grouped_linear_tiled(const GroupedLinear4bitArgs& args, bool input_gradient, void* stream);

Split linear_vector_split(const Linear4bitArgs& args);
Split linear_mma_split(const Linear4bitArgs& args, int capability);
Split linear_dx_mma_split(const Linear4bitArgs& args, int capability);
// A block has a processor for itself.
Split linear_wgmma_split(const Linear4bitArgs& args, int processors);
Split linear_dx_wgmma_split(const Linear4bitArgs& args, int processors);

namespace {

// Parts so that about `wanted` blocks run where `blocks` would, of a multiple of `step` each: at
// most `max_parts` of them, and at least `min_parts`.
inline Split split_for(std::int64_t length, std::int64_t step, std::int64_t blocks,
                       std::int64_t wanted, int max_parts, std::int64_t min_parts = 1) {
  const std::int64_t steps = ceil_div(length, step);
  std::int64_t parts = wanted / blocks;
  if (parts > max_parts) parts = max_parts;
  if (parts > steps) parts = steps;
  if (parts < min_parts) parts = min_parts;
  const std::int64_t part_steps = ceil_div(steps, parts);
  return {static_cast<int>(ceil_div(steps, part_steps)), part_steps * step};
}

// Blocks of a tensor-core kernel: about two for each of a large GPU's processors.
constexpr std::int64_t kBlocksWanted = 256;

// The split of a tensor-core kernel that would run `blocks`. Where it does not depend on them, as a
// batch-invariant call asks, a row of the result depends on its row of x alone.
inline Split split_for_mma(const Linear4bitArgs& args, std::int64_t length, std::int64_t step,
                           std::int64_t blocks, std::int64_t wanted = kBlocksWanted) {
  constexpr int kMaxParts = 8;
  const std::int64_t min_parts = ceil_div(length, kLongestChain);
  return split_for(length, step, blocks, args.batch_invariant ? 0 : wanted, kMaxParts, min_parts);
}

// Which part of the result a block makes.
struct Tile {
  std::int64_t row0;     // its first row
  std::int64_t columns;  // which of the tiles side by side
  std::int64_t part;     // which part of the contraction
};

// That of this block, where rows are along x of the grid and columns along y.
QKERN_DEVICE Tile this_tile(int tile_rows) {
  return {static_cast<std::int64_t>(blockIdx.x) * tile_rows, blockIdx.y, blockIdx.z};
}

// What is done to a sum before it is rounded: the one place for whatever is fused behind a matmul.
// Every kernel that writes results has one; those that write parts leave it to sum_splits.
template <typename T>
struct Epilogue {
  const T* bias;  // [columns], or nullptr

  QKERN_DEVICE float operator()(float sum, std::int64_t row, std::int64_t column) const {
    (void)row;
    return bias == nullptr ? sum : __fadd_rn(sum, to_float(bias[column]));
  }
};

// What every matmul kernel is launched with.
template <typename T>
struct Operands {
  const T* x;  // dy in the input gradient
  std::int64_t m, x_row_stride;
  const std::uint8_t* packed;
  Scales scales;
  CodeSource source;
  std::int64_t rows, cols;  // of W
};

template <typename T>
Operands<T> operands_of(const Linear4bitArgs& args) {
  const Weight4bit& weight = args.weight;
  return {static_cast<const T*>(args.x),
          args.m,
          args.x_row_stride,
          weight.packed,
          scales_of(weight),
          code_source(weight.codes),
          weight.rows,
          weight.cols};
}

// Launches a kernel whose blocks in z are the parts of a contraction, and sums those.
template <typename KernelArgs>
Status launch_parts(const char* what, void (*kernel)(KernelArgs), LaunchConfig config,
                    const KernelArgs& kernel_args, const Linear4bitArgs& args, const Split& split,
                    std::int64_t columns) {
  config.grid.z = static_cast<unsigned>(split.count);
  const Status status = launch(what, kernel, config, kernel_args);
  if (!status.ok() || split.count == 1) return status;
  return sum_splits(args, split.count, columns, config.stream);
}

// Where a tensor-core kernel leaves its results. W is the mma's first operand, 16 rows of its
// result, and x the second, so that x's fragments are registers as a 128-bit load leaves them. A
// warp's two fragments are 32 columns of y: lane (g, t), g = lane / 4 and t = lane % 4, holds
// columns 4g...4g+3 of rows 2t and 2t + 1.
template <typename T>
struct MmaOutput {
  Epilogue<T> epilogue;
  T* y;          // [m, columns]
  float* parts;  // [parts, m, columns] instead of y where the contraction is split
  std::int64_t m, columns;
};

template <typename T>
struct MmaArgs : Operands<T> {
  std::int64_t split_length;
  std::int64_t share_length;  // of a group of warps, where a block has several
  MmaOutput<T> output;
};

template <typename T>
MmaArgs<T> mma_args(const Linear4bitArgs& args, const Split& split, std::int64_t columns) {
  return {operands_of<T>(args),
          split.length,
          split.length,
          {{static_cast<const T*>(args.bias)},
           static_cast<T*>(args.y),
           split.count > 1 ? args.workspace : nullptr,
           args.m,
           columns}};
}

template <int kRowFragments, int kFragments>
QKERN_DEVICE void clear(float (&sum)[kRowFragments][kFragments][4]) {
#pragma unroll
  for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][f][e] = 0.0f;
    }
  }
}

// Stores a run of neighbouring results of a row, four or eight, whose first is at a multiple of as
// many columns.
template <typename T, int kCount>
QKERN_DEVICE void store_run(const MmaOutput<T>& output, const float (&sums)[kCount],
                            std::int64_t row, std::int64_t column) {
  const std::int64_t at = row * output.columns + column;
  const bool whole = output.columns % kCount == 0 && column < output.columns;
  if (output.parts != nullptr) {
    float* const out = output.parts + blockIdx.z * output.m * output.columns + at;
    if (whole) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        store_global16(out + i, uint4{__float_as_uint(sums[i]), __float_as_uint(sums[i + 1]),
                                      __float_as_uint(sums[i + 2]), __float_as_uint(sums[i + 3])});
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (column + i < output.columns) out[i] = sums[i];
    }
    return;
  }
  T* const out = output.y + at;
  std::uint32_t pairs[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    float two[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const std::int64_t c = column + i + e;
      two[e] = c < output.columns ? output.epilogue(sums[i + e], row, c) : 0.0f;
    }
    pairs[i / 2] = pack_pair<T>(two[0], two[1]);
  }
  if (whole && is_aligned16(output.y)) {
    store_words(out, pairs);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (column + i < output.columns) {
      out[i] = T{static_cast<std::uint16_t>(pairs[i / 2] >> (16 * (i % 2)))};
    }
  }
}

// Stores eight rows from `row0`, 32 columns from `column0`; all lanes of the warp call it.
template <typename T>
QKERN_DEVICE void store_fragments(const MmaOutput<T>& output, const float (&sum)[2][4],
                                  std::int64_t row0, std::int64_t column0, int lane) {
  const int g = lane / 4;
  const int t = lane % 4;
  const std::int64_t mine = column0 + 4 * g;
  if (output.parts != nullptr) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const std::int64_t row = row0 + 2 * t + e;
      float* const out = output.parts + (blockIdx.z * output.m + row) * output.columns;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (row < output.m && mine + c < output.columns)
          out[mine + c] = sum[c / 2][2 * (c % 2) + e];
      }
    }
    return;
  }
  std::uint32_t pairs[2][2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float values[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      values[c] = sum[c / 2][2 * (c % 2) + e];
      if (mine + c < output.columns) {
        values[c] = output.epilogue(values[c], row0 + 2 * t + e, mine + c);
      }
    }
    pairs[e][0] = pack_pair<T>(values[0], values[1]);
    pairs[e][1] = pack_pair<T>(values[2], values[3]);
  }
  // Lanes with even g take the even row, eight columns of it, and give their part of the odd one.
  const bool odd = (g & 1) != 0;
  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t received = __shfl_xor_sync(kAllLanes, odd ? pairs[0][i] : pairs[1][i], 4);
    words[i] = odd ? received : pairs[0][i];
    words[2 + i] = odd ? pairs[1][i] : received;
  }
  const std::int64_t row = row0 + 2 * t + (odd ? 1 : 0);
  const std::int64_t column = column0 + 4 * (g & ~1);
  if (row >= output.m) return;
  T* const out = output.y + row * output.columns + column;
  if (output.columns % 8 == 0 && is_aligned16(output.y)) {
    if (column < output.columns) {
      store_global16(out, uint4{words[0], words[1], words[2], words[3]});
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (column + c < output.columns) {
      out[c] = T{static_cast<std::uint16_t>(words[c / 2] >> (16 * (c % 2)))};
    }
  }
}

}  // namespace
}  // namespace qkern::cuda
