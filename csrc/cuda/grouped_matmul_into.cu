// Products of dense matrices by experts, of which one side is narrow: those of adapters. Any dtypes
// and strides; float32 tiles, one element at a time.
//
// The order of a sum depends on its terms and on the matrices' widths, never on where a row lies.
#include "groups.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadRows = 4;  // results of a thread
constexpr int kThreadColumns = 4;
// A sum restarts after so many products and joins a second one, as in linear_4bit_tiled.cu.
constexpr int kChain = 256;

// A matrix whose rows are a result's rows, or its columns, and whose columns are the sums' terms.
struct Factor {
  const void* data;
  DType dtype;  // at run time, for of three matrices with three dtypes there are 27 combinations
  std::int64_t stride, term_stride;  // in elements
};

struct IntoArgs {
  Factor a, b;
  void* out;  // contiguous
  DType out_dtype;
  std::int64_t rows, columns;  // of an expert's own result, or of that of all
  // Where it is of all: how many terms, and in elements from one expert's b to the next. Else an
  // expert's rows are the terms.
  std::int64_t terms, b_stride;
  int m;  // rows that experts share
  float alpha;
  bool accumulate;
  Groups groups;
};

// A tile of the result, and of which terms.
struct IntoTile {
  std::int64_t column0;
  std::int64_t rows;        // that there are from its first on
  std::int64_t terms;       // none: zeros
  std::int64_t a_at, b_at;  // the first row's and the first column's, in elements
  std::int64_t out_at;      // the first result
};

// A tile that has fewer results than all threads can have is shared out: each group of threads has
// all of it, and a share of the terms.
template <int kRows, int kColumns, int kDepth>
struct IntoShape {
  static constexpr int kLanes = kColumns / kThreadColumns;  // threads side by side
  static constexpr int kOwners = kRows / kThreadRows * kLanes;
  static constexpr int kShares = kThreads / kOwners;
  static constexpr int kShareDepth = kDepth / kShares;
  // Of a share's sums, and of a row of them: what a warp writes or reads at a time is in different
  // banks.
  static constexpr int kSumStride = kColumns + (kColumns == 16 ? 2 : 4);
  static constexpr int kSums = kRows * kSumStride + 4;
  static_assert(kShares * kOwners == kThreads && kShares * kShareDepth == kDepth);
  static_assert(kChain % kShareDepth == 0, "chains end with a tile");
};

// Of the factors' terms by turns, and of all shares' sums in the end.
template <int kRows, int kColumns, int kDepth>
union IntoShared {
  // Transposed, so that a thread reads neighbours; the padding keeps the transposing writes of a
  // warp in different banks.
  struct {
    float a[kDepth][kRows + 1];
    float b[kDepth][kColumns + 1];
  } terms;
  float sums[IntoShape<kRows, kColumns, kDepth>::kShares]
            [IntoShape<kRows, kColumns, kDepth>::kSums];
};

QKERN_DEVICE int at_most(std::int64_t count, int limit) {
  return count < limit ? static_cast<int>(count) : limit;
}

// Calls body with a zero of a dtype.
template <typename Body>
QKERN_DEVICE void in_dtype(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) return body(0.0f);
  if (dtype == DType::kBFloat16) return body(BFloat16{});
  return body(Float16{});
}

// Which elements of a factor's tiles a thread brings to shared memory: the first of a tile, and how
// far on the others are. Of neighbouring threads they are neighbours along the terms, where these
// are neighbours in memory, or along the rows.
template <int kWidth, int kDepth>
struct Walk {
  static_assert(kThreads % kWidth == 0 && kThreads % kDepth == 0 && kDepth % kWarp == 0);
  static constexpr int kSteps = kWidth * kDepth / kThreads;
  bool along_terms;
  int row, term;
  std::int64_t at;  // in memory, in elements

  QKERN_DEVICE Walk(const Factor& factor, std::int64_t first)
      : along_terms(factor.term_stride == 1) {
    const int thread = static_cast<int>(threadIdx.x);
    row = along_terms ? thread / kDepth : thread % kWidth;
    term = along_terms ? thread % kDepth : thread / kWidth;
    // Where a warp has two runs of 16 rows, their terms are 16 apart, which is in other banks.
    if (kWidth == 16 && !along_terms) term = thread / 16 % 2 * 16 + thread / kWarp;
    at = first + row * factor.stride + term * factor.term_stride;
  }

  template <bool kAlongTerms>
  static QKERN_DEVICE int rows_on(int i) {
    return kAlongTerms ? i * (kThreads / kDepth) : 0;
  }
  template <bool kAlongTerms>
  static QKERN_DEVICE int terms_on(int i) {
    if (kWidth == 16 && !kAlongTerms) return i % 2 * 8 + i / 2 * 32;
    return kAlongTerms ? 0 : i * (kThreads / kWidth);
  }

  // The bits of the `terms` terms that there are of `count` rows; zeros where there are none.
  template <typename Word, bool kAlongTerms>
  QKERN_DEVICE void fetch(const Factor& factor, int count, std::int64_t terms,
                          std::uint32_t (&bits)[kSteps]) const {
    const Word* from = static_cast<const Word*>(factor.data) + at;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int rows = rows_on<kAlongTerms>(i);
      const int on = terms_on<kAlongTerms>(i);
      bits[i] = row + rows < count && term + on < terms ? *from : 0u;
      from += (rows_on<kAlongTerms>(i + 1) - rows) * factor.stride +
              (terms_on<kAlongTerms>(i + 1) - on) * factor.term_stride;
    }
  }
  // They are not looked at here, so that all are on their way together.
  QKERN_DEVICE void fetch(const Factor& factor, int count, std::int64_t terms,
                          std::uint32_t (&bits)[kSteps]) const {
    const bool wide = factor.dtype == DType::kFloat32;
    if (along_terms) {
      wide ? fetch<std::uint32_t, true>(factor, count, terms, bits)
           : fetch<std::uint16_t, true>(factor, count, terms, bits);
    } else {
      wide ? fetch<std::uint32_t, false>(factor, count, terms, bits)
           : fetch<std::uint16_t, false>(factor, count, terms, bits);
    }
  }

  template <bool kAlongTerms>
  QKERN_DEVICE void place(DType dtype, const std::uint32_t (&bits)[kSteps],
                          float (&placed)[kDepth][kWidth + 1]) const {
    float* const to = &placed[term][row];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const auto half = static_cast<std::uint16_t>(bits[i]);
      float value = __uint_as_float(bits[i]);
      if (dtype == DType::kBFloat16) value = to_float(BFloat16{half});
      if (dtype == DType::kFloat16) value = to_float(Float16{half});
      to[terms_on<kAlongTerms>(i) * (kWidth + 1) + rows_on<kAlongTerms>(i)] = value;
    }
  }
  QKERN_DEVICE void place(DType dtype, const std::uint32_t (&bits)[kSteps],
                          float (&placed)[kDepth][kWidth + 1]) const {
    if (along_terms) {
      place<true>(dtype, bits, placed);
    } else {
      place<false>(dtype, bits, placed);
    }
  }
};

template <int kRows, int kColumns, int kDepth>
QKERN_DEVICE void multiply_into(const IntoArgs& args, const IntoTile& tile) {
  using Shape = IntoShape<kRows, kColumns, kDepth>;
  using Shared = IntoShared<kRows, kColumns, kDepth>;
  QKERN_SHARED(Shared, shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int share = thread / Shape::kOwners;
  const int thread_row = thread % Shape::kOwners / Shape::kLanes * kThreadRows;
  const int lane = thread % Shape::kLanes;
  const int rows = at_most(tile.rows, kRows);
  const int columns = at_most(args.columns - tile.column0, kColumns);

  float total[kThreadRows][kThreadColumns];
  float sum[kThreadRows][kThreadColumns];
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) total[i][j] = sum[i][j] = 0.0f;
  }
  Walk<kRows, kDepth> of_a(args.a, tile.a_at);
  Walk<kColumns, kDepth> of_b(args.b, tile.b_at);
  std::uint32_t a_bits[of_a.kSteps];
  std::uint32_t b_bits[of_b.kSteps];
  for (std::int64_t term0 = 0; term0 < tile.terms; term0 += kDepth) {
    of_a.fetch(args.a, rows, tile.terms - term0, a_bits);
    of_b.fetch(args.b, columns, tile.terms - term0, b_bits);
    of_a.at += kDepth * args.a.term_stride;
    of_b.at += kDepth * args.b.term_stride;
    __syncthreads();
    of_a.place(args.a.dtype, a_bits, shared.terms.a);
    of_b.place(args.b.dtype, b_bits, shared.terms.b);
    __syncthreads();
#pragma unroll 4
    for (int d = share; d < kDepth; d += Shape::kShares) {
      float a[kThreadRows];
      float b[kThreadColumns];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) a[i] = shared.terms.a[d][thread_row + i];
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) b[j] = shared.terms.b[d][lane + j * Shape::kLanes];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) sum[i][j] = __fmaf_rn(a[i], b[j], sum[i][j]);
      }
    }
    constexpr int kRestart = kChain * Shape::kShares;
    if ((term0 + kDepth) % kRestart != 0 && term0 + kDepth < tile.terms) continue;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) {
        total[i][j] = __fadd_rn(total[i][j], sum[i][j]);
        sum[i][j] = 0.0f;
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      shared.sums[share][(thread_row + i) * Shape::kSumStride + lane + j * Shape::kLanes] =
          total[i][j];
    }
  }
  __syncthreads();
  in_dtype(args.out_dtype, [&](auto zero) {
    using T = decltype(zero);
    T* const out = static_cast<T*>(args.out) + tile.out_at;
    for (int i = thread; i < kRows * kColumns; i += kThreads) {
      // Of a warp that has 16 columns of two rows, these are 8 apart.
      const int row = kColumns == 16 ? i / 16 % 2 * 8 + i / kWarp : i / kColumns;
      const int column = i % kColumns;
      if (row >= rows || column >= columns) continue;
      const int at = row * Shape::kSumStride + column;
      float value = shared.sums[0][at];
#pragma unroll
      for (int other = 1; other < Shape::kShares; ++other) {
        value = __fadd_rn(value, shared.sums[other][at]);
      }
      // Without terms it is a zero whatever alpha is.
      value = tile.terms == 0 ? 0.0f : __fmul_rn(value, args.alpha);
      T& result = out[row * args.columns + column];
      if (args.accumulate) value = __fadd_rn(to_float(result), value);
      result = from_float<T>(value);
    }
  });
}

// The tile of this block, at (x, y) of the grid, of rows that have experts and by their own b: rows
// of no expert have no terms. Past all rows it has none.
template <int kRows>
QKERN_DEVICE IntoTile tile_of_rows(const IntoArgs& args, std::int64_t column0) {
  const GroupTile found = find_tile<kRows>(args.groups, args.m, blockIdx.x);
  const bool owned = found.expert < args.groups.experts;
  const std::int64_t row0 = static_cast<std::int64_t>(found.first) + found.row0;
  return {column0,
          found.rows - static_cast<std::int64_t>(found.row0),
          owned ? args.terms : 0,
          row0 * args.a.stride,
          (owned ? found.expert * args.b_stride : 0) + column0 * args.b.stride,
          row0 * args.columns + column0};
}

// Of results that have experts: those of an expert are the sums of its rows.
template <int kRows>
QKERN_DEVICE IntoTile tile_of_results(const IntoArgs& args, std::int64_t column0) {
  const unsigned row_tiles = gridDim.x / static_cast<unsigned>(args.groups.experts);
  const int expert = static_cast<int>(blockIdx.x / row_tiles);
  const std::int64_t row0 = static_cast<std::int64_t>(blockIdx.x % row_tiles) * kRows;
  const GroupTile found = find_group(args.groups, args.m, expert);
  return {column0,
          args.rows - row0,
          found.rows,
          found.first * args.a.term_stride + row0 * args.a.stride,
          found.first * args.b.term_stride + column0 * args.b.stride,
          (expert * args.rows + row0) * args.columns + column0};
}

template <int kRows, int kColumns, int kDepth, bool kOwnResults>
QKERN_KERNEL(kThreads, 2)
grouped_matmul_into_kernel(const IntoArgs args) {
  const std::int64_t column0 = static_cast<std::int64_t>(blockIdx.y) * kColumns;
  const IntoTile tile =
      kOwnResults ? tile_of_results<kRows>(args, column0) : tile_of_rows<kRows>(args, column0);
  if (tile.rows <= 0) return;
  if (tile.terms == 0 && args.accumulate) return;  // also a negative zero stays
  multiply_into<kRows, kColumns, kDepth>(args, tile);
}

IntoArgs into_args(const GroupedMatmulIntoArgs& args) {
  const MatmulIntoArgs& all = args.all;
  Factor a{all.a, all.a_dtype, all.a_row_stride, all.a_col_stride};
  if (!args.own_b) a = {all.a, all.a_dtype, all.a_col_stride, all.a_row_stride};
  return {a,
          {all.b, all.b_dtype, all.b_col_stride, all.b_row_stride},
          all.out,
          all.out_dtype,
          args.own_b ? all.m : all.k,
          all.n,
          all.k,
          args.b_stride,
          static_cast<int>(all.m),
          all.alpha,
          all.accumulate,
          {args.groups.offsets, args.groups.wide, static_cast<int>(args.groups.experts), {}}};
}

template <int kRows, int kColumns, int kDepth, bool kOwnResults>
Status start(const GroupedMatmulIntoArgs& args, void* stream) {
  const std::int64_t experts = args.groups.experts;
  const std::int64_t row_tiles =
      kOwnResults ? experts * ceil_div(args.all.k, kRows) : most_tiles(args.all.m, experts, kRows);
  // Tiles and the rows in them are counted in 32 bits.
  constexpr std::int64_t kLargestTile = 64;
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  if (row_tiles >= kMost || args.all.m + kLargestTile * (experts + 1) >= kMost) {
    return Status::error(
        "grouped_matmul_into: takes fewer than 2^31 rows, with 64 for each expert");
  }
  const dim3 grid(static_cast<unsigned>(row_tiles),
                  static_cast<unsigned>(ceil_div(args.all.n, kColumns)));
  return launch("grouped_matmul_into_kernel",
                grouped_matmul_into_kernel<kRows, kColumns, kDepth, kOwnResults>,
                {grid, kThreads, 0, stream}, into_args(args));
}

}  // namespace

Status grouped_matmul_into(const GroupedMatmulIntoArgs& args, void* stream) {
  const MatmulIntoArgs& all = args.all;
  if (all.m == 0 || all.n == 0 || all.k == 0 || args.groups.experts == 0) return Status::success();
  // Of a result with few columns there are few tiles, each with many terms: small ones, whose
  // terms are shared out. By rows it must not matter how many there are.
  constexpr std::int64_t kFewColumns = 64;
  constexpr std::int64_t kFewRows = 32;
  if (args.own_b) {
    return all.n <= kFewColumns ? start<16, 16, 128, false>(args, stream)
                                : start<64, 64, 32, false>(args, stream);
  }
  return all.k <= kFewRows ? start<16, 64, 32, true>(args, stream)
                           : start<64, 64, 32, true>(args, stream);
}

}  // namespace qkern::cuda
