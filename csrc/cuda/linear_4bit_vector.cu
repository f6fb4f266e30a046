// y = x W^T + bias for a few rows of x, as dot products in float32: a warp takes a few rows of W,
// its lanes 32 neighbouring codes each. Where rows of W are too few to fill a GPU, groups of a
// block's warps take shares of the contraction, which are added in order. A row of y depends on its
// row of x alone: neither the shares nor the order of its sums follows from how many rows there
// are.
#include "vector.cuh"

namespace qkern::cuda {
namespace {

// One result with every weight scaled before it is multiplied; all lanes of the warp call it.
template <typename T>
QKERN_DEVICE float scaled_dot(const VectorArgs<T>& args, const CodeTable& table, std::int64_t row,
                              std::int64_t n, std::int64_t begin, std::int64_t end,
                              float nested_offset, int lane) {
  float sum = 0.0f;
  for (std::int64_t k = begin + lane; k < end; k += kWarp) {
    const std::int64_t element = n * args.cols + k;
    const float scale = load_scale(args.scales, nested_offset, element);
    const float w = __fmul_rn(code_value(table, packed_code(args.packed, element)), scale);
    sum = __fmaf_rn(w, to_float(args.x[row * args.x_row_stride + k]), sum);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, step));
  }
  return sum;
}

// A tile's codes of a lane and what its scales are made of.
template <int kWarpRows>
struct Fetched {
  uint4 codes[kWarpRows];
  FetchedScale scales[kWarpRows];
};

// Adds a lane's unscaled products of 32 codes of each row of W.
template <typename T, int kRows, int kWarpRows>
QKERN_DEVICE void multiply(const VectorShared<T, kRows>& shared, int group, int tile, int lane,
                           const uint4 (&codes)[kWarpRows], float (&sum)[kWarpRows][kRows]) {
#pragma unroll
  for (int eight = 0; eight < kLaneCodes / 8; ++eight) {
    float w[kWarpRows][8];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const WordCodes word(eight == 0   ? codes[r].x
                           : eight == 1 ? codes[r].y
                           : eight == 2 ? codes[r].z
                                        : codes[r].w);
#pragma unroll
      for (int i = 0; i < 8; ++i) w[r][i] = word.value(shared.table, i);
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      float x[8];
      staged8(shared, group, tile, m, lane, eight, x);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[r][m] = __fmaf_rn(w[r][i], x[i], sum[r][m]);
      }
    }
  }
}

// Adds a lane's products from k on, up to 32 of each row, each with its own scale.
template <typename T, int kRows, int kWarpRows>
QKERN_DEVICE void multiply_singly(const VectorArgs<T>& args, float nested_offset,
                                  const VectorShared<T, kRows>& shared, int group, int tile,
                                  int lane, std::int64_t n0, std::int64_t k, std::int64_t end,
                                  float (&sum)[kWarpRows][kRows]) {
  // Not unrolled: 32 copies of the address arithmetic take minutes to compile.
#pragma unroll 1
  for (int i = 0; i < kLaneCodes && k + i < end; ++i) {
    float w[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const std::int64_t element = (n0 + r) * args.cols + k + i;
      w[r] = n0 + r < args.rows
                 ? __fmul_rn(code_value(shared.table, packed_code(args.packed, element)),
                             load_scale(args.scales, nested_offset, element))
                 : 0.0f;
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const float x = staged1(shared, group, tile, m, lane, i);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) sum[r][m] = __fmaf_rn(w[r], x, sum[r][m]);
    }
  }
}

// kWhole: every lane's 32 codes are 16 aligned bytes in one block, and x comes in 16-byte pieces.
// Otherwise rows of W start anywhere, and codes and scales are fetched one by one.
template <typename T, int kRows, int kWarpRows, bool kWhole>
QKERN_DEVICE void multiply_rows(const VectorArgs<T>& args, const Tile& place) {
  using Shared = VectorShared<T, kRows>;
  constexpr unsigned kStage = Shared::kTiles * kTile;
  QKERN_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp % kWarps;
  const int group = static_cast<int>(threadIdx.x) / kThreads;
  const int groups = static_cast<int>(blockDim.x) / kThreads;
  const std::int64_t n0 = (place.columns * kWarps + warp) * kWarpRows;
  const std::int64_t row0 = place.row0;
  const std::int64_t begin = place.part * args.split_length;
  const std::int64_t end =
      begin + args.split_length < args.cols ? begin + args.split_length : args.cols;
  const unsigned length = static_cast<unsigned>(end - begin);
  const unsigned share_length = static_cast<unsigned>(args.share_length);

  // At the first row of W, and from there to the other rows, which fits 32 bits too. A row past the
  // end is the last one again, unused.
  const uint4* codes = nullptr;
  ScaleRun run{};
  unsigned row_pieces[kWarpRows] = {};  // of 16 bytes
  unsigned row_position[kWarpRows] = {};
  if constexpr (kWhole) {
    const std::int64_t first = n0 < args.rows ? n0 : args.rows - 1;
    const std::int64_t element = first * args.cols + begin;
    codes = reinterpret_cast<const uint4*>(args.packed) + element / kLaneCodes;
    run.start(args.scales, element);
    row_position[0] = run.first;
#pragma unroll
    for (int r = 1; r < kWarpRows; ++r) {
      const unsigned step = first + r < args.rows ? static_cast<unsigned>(args.cols) : 0;
      row_pieces[r] = row_pieces[r - 1] + step / kLaneCodes;
      row_position[r] = row_position[r - 1] + step;
    }
  }
  // A lane past the end takes the last codes, and zeros for x: so lanes do not part.
  auto fetch = [&](unsigned k0, Fetched<kWarpRows>& into) {
    if constexpr (kWhole) {
      const unsigned last = length - kLaneCodes;
      const unsigned mine = k0 + lane * kLaneCodes;
      const unsigned k = mine < last ? mine : last;
      const uint4* const at = codes + k / kLaneCodes;
      unsigned positions[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        into.codes[r] = load_global16(at + row_pieces[r]);
        positions[r] = row_position[r] + k;
      }
      fetch_scales(args.scales, run, positions, into.scales);
    }
  };
  // A tile is under way while x is staged, and, where registers allow, while the one before is
  // multiplied.
  constexpr bool kFarAhead = kRows <= 2 && sizeof(T) == 2;
  Fetched<kWarpRows> next;
  fetch(group * share_length, next);
  stage_codes(args.source, shared.table);
  const float nested_offset = load_nested_offset(args.scales);

  for (int share0 = 0; share0 < args.shares; share0 += groups) {
    const int share = share0 + group;
    const unsigned from = share * share_length;
    const unsigned to = share >= args.shares           ? from
                        : from + share_length < length ? from + share_length
                                                       : length;
    if (share0 > 0) fetch(from, next);
    float total[kWarpRows][kRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) total[r][m] = 0.0f;
    }
    for (unsigned stage = 0; stage < share_length; stage += kStage) {
      const unsigned left = from + stage < to ? (to - from - stage + kTile - 1) / kTile : 0;
      const int tiles = left < Shared::kTiles ? static_cast<int>(left) : Shared::kTiles;
      if constexpr (kWhole) {
        stage_pieces(args, row0, begin + from + stage, tiles, group, shared);
      } else {
        stage_singly(args, row0, begin + from + stage, tiles, group, shared);
      }
      __syncthreads();
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        const unsigned k0 = from + stage + tile * kTile;
        float sum[kWarpRows][kRows];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
          for (int m = 0; m < kRows; ++m) sum[r][m] = 0.0f;
        }
        if constexpr (kWhole) {
          float scale[kWarpRows];
          finish_scales(args.scales, nested_offset, next.scales, scale);
          const Fetched<kWarpRows> now = next;
          if constexpr (kFarAhead) fetch(k0 + kTile, next);
          multiply(shared, group, tile, lane, now.codes, sum);
          if constexpr (!kFarAhead) fetch(k0 + kTile, next);
          // The scale enters once a lane's 32 codes.
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
              total[r][m] = __fmaf_rn(sum[r][m], scale[r], total[r][m]);
            }
          }
        } else {
          multiply_singly(args, nested_offset, shared, group, tile, lane, n0,
                          begin + k0 + lane * kLaneCodes, begin + to, sum);
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
            for (int m = 0; m < kRows; ++m) total[r][m] = __fadd_rn(total[r][m], sum[r][m]);
          }
        }
      }
      // All are done with the tiles that are staged next.
      __syncthreads();
    }

    // Lane r * kRows + m keeps the sum for row n0 + r of W and row m of x.
    static_assert(kWarpRows * kRows <= kWarp, "a lane for each result");
    float mine = 0.0f;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        float value = total[r][m];
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
          value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, step));
        }
        if (lane == r * kRows + m) mine = value;
      }
    }
    if constexpr (kWhole) {
      // Sums of unscaled products leave float32 before the result does, where x is near its end.
#pragma unroll 1
      for (int i = 0; i < kWarpRows * kRows; ++i) {
        const bool finite = magnitude_bits(__shfl_sync(kAllLanes, mine, i)) < kInfBits;
        const std::int64_t row = row0 + i % kRows;
        const std::int64_t n = n0 + i / kRows;
        if (finite || row >= args.m || n >= args.rows) continue;
        const float again =
            scaled_dot(args, shared.table, row, n, begin + from, begin + to, nested_offset, lane);
        if (lane == i) mine = again;
      }
    }
    if (share < args.shares) shared.sums[share][warp][lane] = mine;
  }
  __syncthreads();

  const std::int64_t n = n0 + lane / kRows;
  const std::int64_t row = row0 + lane % kRows;
  if (group > 0 || lane >= kWarpRows * kRows || n >= args.rows || row >= args.m) return;
  float sum = shared.sums[0][warp][lane];
  for (int share = 1; share < args.shares; ++share) {
    sum = __fadd_rn(sum, shared.sums[share][warp][lane]);
  }
  if (args.parts != nullptr) {
    args.parts[(place.part * args.m + row) * args.rows + n] = sum;
  } else {
    args.y[row * args.rows + n] = from_float<T>(args.epilogue(sum, row, n));
  }
}

template <typename T, int kRows, int kWarpRows, bool kWhole>
QKERN_KERNEL((kThreads * VectorShared<T, kRows>::kGroups),
             (VectorShared<T, kRows>::kResidentBlocks))
linear_4bit_vector_kernel(const VectorArgs<T> args) {
  const Tile tile{static_cast<std::int64_t>(blockIdx.y) * kRows, blockIdx.x, blockIdx.z};
  multiply_rows<T, kRows, kWarpRows, kWhole>(args, tile);
}

template <typename T, int kRows, int kWarpRows, bool kWhole>
QKERN_KERNEL((kThreads * VectorShared<T, kRows>::kGroups),
             (VectorShared<T, kRows>::kResidentBlocks))
grouped_linear_4bit_vector_kernel(const Grouped<VectorArgs<T>> args) {
  VectorArgs<T> own = args.all;
  own.parts = nullptr;
  Tile tile;
  if (take_tile<kRows>(args, own.rows, own, own.y, own.epilogue, tile)) {
    multiply_rows<T, kRows, kWarpRows, kWhole>(own, tile);
  }
}

// Rows of W of a block, in most kernels; shares must not depend on which.
constexpr std::int64_t kBlockRows = 16;

template <typename T>
VectorArgs<T> vector_args(const Linear4bitArgs& args, const Split& split) {
  constexpr std::int64_t kWanted =
      1024;  // groups: about eight for each of a large GPU's processors
  const Split shares =
      split_for(split.length, kTile, ceil_div(args.weight.rows, kBlockRows), kWanted, kMaxShares);
  return {operands_of<T>(args),
          split.length,
          shares.length,
          shares.count,
          {static_cast<const T*>(args.bias)},
          static_cast<T*>(args.y),
          split.count > 1 ? args.workspace : nullptr};
}

template <typename T, int kRows>
LaunchConfig vector_config(const VectorArgs<T>& args, std::int64_t x, std::int64_t y,
                           void* stream) {
  using Shared = VectorShared<T, kRows>;
  const int groups = args.shares < Shared::kGroups ? args.shares : Shared::kGroups;
  const std::size_t unused = (Shared::kGroups - groups) * sizeof(Shared::x[0]);
  return {dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)), groups * kThreads,
          sizeof(Shared) - unused, stream};
}

template <typename T, int kRows, int kWarpRows, bool kWhole>
Status launch_rows(const Linear4bitArgs& args, const Split& split, void* stream) {
  const std::int64_t columns = args.weight.rows;
  const VectorArgs<T> launch_args = vector_args<T>(args, split);
  const LaunchConfig config = vector_config<T, kRows>(
      launch_args, ceil_div(columns, kWarps * kWarpRows), ceil_div(args.m, kRows), stream);
  return launch_parts("linear_4bit_vector_kernel",
                      linear_4bit_vector_kernel<T, kRows, kWarpRows, kWhole>, config, launch_args,
                      args, split, columns);
}

template <typename T, int kRows, int kWarpRows, bool kWhole>
Status launch_grouped(const GroupedLinear4bitArgs& args, void* stream) {
  const Weight4bit& weight = args.all.weight;
  const VectorArgs<T> all = vector_args<T>(args.all, {1, weight.cols});
  // Along x, where the grid has room for any number of them.
  const LaunchConfig config = vector_config<T, kRows>(
      all, grouped_tiles(args, kRows), ceil_div(weight.rows, kWarps * kWarpRows), stream);
  return launch("grouped_linear_4bit_vector_kernel",
                grouped_linear_4bit_vector_kernel<T, kRows, kWarpRows, kWhole>, config,
                grouped(args, all));
}

// Whether a kernel reads W and x in pieces of 16 bytes.
template <typename T>
bool comes_in_pieces(const Linear4bitArgs& args) {
  const auto in_pieces = [](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
  };
  return args.weight.cols % kLaneCodes == 0 && in_pieces(args.weight.packed) &&
         args.weight.cols <= kLongestRow && in_pieces(args.x) &&
         args.x_row_stride * sizeof(T) % 16 == 0;
}

}  // namespace

// One, but where a contraction is longer than offsets in a part go.
Split linear_vector_split(const Linear4bitArgs& args) {
  return split_for(args.weight.cols, kTile, 1, 0, 1, ceil_div(args.weight.cols, kLongestPart));
}

Status linear_vector(const Linear4bitArgs& args, const Split& split, void* stream) {
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool whole = comes_in_pieces<T>(args);
    Linear4bitArgs some = args;
    for (std::int64_t row = 0; row < args.m; row += kVectorLaunchRows) {
      some.x = static_cast<const T*>(args.x) + row * args.x_row_stride;
      some.y = static_cast<T*>(args.y) + row * args.weight.rows;
      some.m = args.m - row < kVectorLaunchRows ? args.m - row : kVectorLaunchRows;
      Status status;
      if (!whole) {
        // One kernel for any number of rows: such shapes are rare.
        status = launch_rows<T, 4, 4, false>(some, split, stream);
      } else if (some.m == 1) {
        status = launch_rows<T, 1, 4, true>(some, split, stream);
      } else if (some.m == 2) {
        status = launch_rows<T, 2, 4, true>(some, split, stream);
      } else if (some.m <= 4) {
        status = launch_rows<T, 4, 4, true>(some, split, stream);
      } else {
        status = launch_rows<T, 8, 2, true>(some, split, stream);
      }
      if (!status.ok()) return status;
    }
    return Status::success();
  });
}

// A tile decodes W for as many rows as it has, whether an expert has them or not: 0.139, 0.180,
// 0.311 and 0.605 clocks a weight for 1, 2, 4 and 8 (_cuda_paths.py). Where rows fall to experts by
// chance, 1 is the cheapest up to half a row for each expert on average, 2 to 4, 4 to 16. As many
// experts as a token goes to have one row each, so a single token is among the first.
Status grouped_linear_vector(const GroupedLinear4bitArgs& args, void* stream) {
  return with_dtype(args.all.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::int64_t m = args.all.m;
    if (!comes_in_pieces<T>(args.all)) return launch_grouped<T, 4, 4, false>(args, stream);
    // Of float32 a kernel for one row would spill registers.
    if constexpr (sizeof(T) == 2) {
      if (m == 1 || 2 * m <= args.groups.experts)
        return launch_grouped<T, 1, 4, true>(args, stream);
    }
    if (m <= 4 * args.groups.experts) return launch_grouped<T, 2, 4, true>(args, stream);
    if (m <= 16 * args.groups.experts) return launch_grouped<T, 4, 4, true>(args, stream);
    return launch_grouped<T, 8, 2, true>(args, stream);
  });
}

}  // namespace qkern::cuda
