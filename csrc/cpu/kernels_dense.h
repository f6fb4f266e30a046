// out = alpha a b (+ out) of dense matrices, of which one is narrow, as a LoRA adapter's factors
// are. Dtypes may differ, sums are in float32. A tile packs its columns of b as panels, which stay
// in the second-level cache while strip after strip of a passes them.
#pragma once

#include <cstdint>

#include "kernels_tiled.h"
#include "parallel.h"
#include "scratch.h"

namespace qkern::cpu {
namespace {

// `fn` with an element of the dtype, which tells its type.
template <typename Fn>
void with_dtype(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kBFloat16:
      return fn(BFloat16{});
    default:
      return fn(Float16{});
  }
}

struct DensePlan {
  // Steps that are multiplied at a time: a strip and a panel of so many fit in the first-level
  // cache together.
  static constexpr std::int64_t kDepth = FloatEngine::kDepth;
  static constexpr std::int64_t kStripRows = Simd::kTileRows;
  static constexpr std::int64_t kMostRows = 192;
  static constexpr std::int64_t kMostCols = 192;
  static constexpr std::int64_t kLeastCols = 64;
  static constexpr std::int64_t kPanelFloats = 1 << 15;  // with room for a in the second level
  // A strip of more than 8 rows has more addresses than there are registers for them.
  static constexpr bool kReadsInPlace = kStripRows <= 8;

  bool in_place;       // a is read where it lies
  std::int64_t width;  // of a panel: a register's where there are no more columns
  std::int64_t slice, tile_rows, tile_cols, row_tiles, col_tiles;

  DensePlan(const MatmulIntoArgs& args, int num_threads) {
    in_place = kReadsInPlace && args.a_dtype == DType::kFloat32 && args.a_col_stride == 1 &&
               args.k % Simd::kTileSteps == 0;
    width = args.n <= kLanes ? kLanes : kTileCols;
    // Of the sizes alone: the order of the sums depends on it.
    const std::int64_t fit = kPanelFloats / round_up(min64(args.n, kMostCols), width);
    slice = round_up(min64(args.k, fit > kDepth ? fit / kDepth * kDepth : fit), Simd::kTileSteps);
    const std::int64_t least = ceil_div(args.n, kMostCols);
    if (args.m > kMostRows) {
      tile_cols = balanced(args.n, least, width);
    } else {  // few rows: columns are what threads share
      const std::int64_t most = max64(least, args.n / kLeastCols);
      tile_cols = balanced(args.n, min64(round_up(least, num_threads), most), width);
    }
    col_tiles = ceil_div(args.n, tile_cols);
    // Two tiles a thread where there are as many: one that comes late holds up less.
    const std::int64_t wanted = ceil_div(std::int64_t{2} * num_threads, col_tiles);
    const std::int64_t share = max64(ceil_div(args.m, wanted), 4 * kStripRows);
    tile_rows = balanced(args.m, ceil_div(args.m, min64(share, kMostRows)), kStripRows);
    row_tiles = ceil_div(args.m, tile_rows);
  }

  std::int64_t panel_floats() const { return slice * tile_cols; }
  std::int64_t strip_floats() const { return kStripRows * FloatEngine::kRowStride; }
  std::int64_t sum_floats() const { return tile_rows * tile_cols; }
  std::size_t bytes() const {
    return static_cast<std::size_t>(panel_floats() + strip_floats() + sum_floats()) * sizeof(float);
  }

 private:
  // `size` in so many parts, about equal, in multiples of `unit`.
  static std::int64_t balanced(std::int64_t size, std::int64_t parts, std::int64_t unit) {
    return round_up(ceil_div(size, parts), unit);
  }
};

class DenseTask {
 public:
  DenseTask(const MatmulIntoArgs& args, const DensePlan& plan, float* scratch)
      : args_(args),
        plan_(plan),
        panels_(scratch),
        strip_(panels_ + plan.panel_floats()),
        sums_(strip_ + plan.strip_floats()) {
    if constexpr (DensePlan::kReadsInPlace) {
      if (plan.in_place) {
        fill<kAnyStride>();
        return;
      }
    }
    fill<FloatEngine::kRowStride>();
  }

  void compute(std::int64_t tile) {
    // Tiles of the same columns follow each other, and may find those of b packed.
    const std::int64_t row0 = tile % plan_.row_tiles * plan_.tile_rows;
    const std::int64_t col0 = tile / plan_.row_tiles * plan_.tile_cols;
    const std::int64_t rows = min64(plan_.tile_rows, args_.m - row0);
    const std::int64_t cols = min64(plan_.tile_cols, args_.n - col0);
    const std::int64_t strips = ceil_div(rows, DensePlan::kStripRows);
    std::int64_t k = 0;
    do {
      const std::int64_t depth = min64(plan_.slice, args_.k - k);
      pack_panels(k, depth, col0, cols);
      for (std::int64_t s = 0; s < strips; ++s) {
        // As even as they come.
        const std::int64_t begin = s * rows / strips, end = (s + 1) * rows / strips;
        std::int64_t i = 0;
        do {  // once without steps, too, which makes zeros
          multiply(row0 + begin, begin, end - begin, k, i, min64(DensePlan::kDepth, depth - i),
                   cols);
          i += DensePlan::kDepth;
        } while (i < depth);
        if (k + plan_.slice < args_.k) continue;
        for (std::int64_t r = begin; r < end; ++r) store(row0 + r, r, col0, cols);
      }
      k += plan_.slice;
    } while (k < args_.k);
  }

 private:
  const MatmulIntoArgs& args_;
  const DensePlan& plan_;
  MultiplyFn<float> multiply_[DensePlan::kStripRows + 1] = {};
  float* panels_;                                 // [tile_cols / width][slice][width]
  float* strip_;                                  // [kStripRows][FloatEngine::kRowStride]
  float* sums_;                                   // [tile_cols / width][tile_rows][width]
  std::int64_t packed_k_ = -1, packed_col_ = -1;  // where the panels begin

  template <int kRowStride>
  void fill() {
    constexpr int kRows = DensePlan::kStripRows;
    plan_.width == kLanes ? fill_narrow<kRows, kRowStride>(multiply_)
                          : fill_multiply<kRows, kRowStride, FloatStep>(multiply_);
  }

  float* panel(std::int64_t n) const { return panels_ + n * plan_.slice; }
  float* sums(std::int64_t n, std::int64_t row) const {
    return sums_ + n * plan_.tile_rows + row * plan_.width;
  }

  // Rows [row, row + rows) of a, which are rows from `begin` on of the tile, by steps
  // [k + i, k + i + depth) of the panels, which begin at k.
  void multiply(std::int64_t row, std::int64_t begin, std::int64_t rows, std::int64_t k,
                std::int64_t i, std::int64_t depth, std::int64_t cols) const {
    const std::int64_t padded = round_up(depth, Simd::kTileSteps);
    const float* a = strip_;
    std::int64_t stride = FloatEngine::kRowStride;
    if (plan_.in_place) {
      a = static_cast<const float*>(args_.a) + row * args_.a_row_stride + k + i;
      stride = args_.a_row_stride;
    } else {
      pack_strip(row, rows, k + i, depth, padded);
    }
    for (std::int64_t n = 0; n < cols; n += plan_.width) {
      multiply_[rows](a, stride, panel(n) + i * plan_.width, padded, sums(n, begin), k + i > 0);
    }
  }

  // Steps [k, k + depth) of columns [col0, col0 + cols) of b, and zeros.
  void pack_panels(std::int64_t k, std::int64_t depth, std::int64_t col0, std::int64_t cols) {
    if (packed_k_ == k && packed_col_ == col0) return;
    packed_k_ = k;
    packed_col_ = col0;
    const std::int64_t width = plan_.width, padded = round_up(depth, Simd::kTileSteps);
    for (std::int64_t n = 0; n < cols; n += width) {
      const std::int64_t zeroed = cols - n < width ? 0 : depth;
      std::memset(panel(n) + zeroed * width, 0,
                  static_cast<std::size_t>((padded - zeroed) * width) * sizeof(float));
    }
    with_dtype(args_.b_dtype, [&](auto element) {
      const auto* b = static_cast<const decltype(element)*>(args_.b) + k * args_.b_row_stride;
      if (args_.b_col_stride != 1) {
        for (std::int64_t c = 0; c < cols; ++c) {
          spread_row(b + (col0 + c) * args_.b_col_stride, args_.b_row_stride, depth,
                     panel(c / width * width) + c % width, width);
        }
        return;
      }
      // Row by row, as they lie: their ends are where the hardware stops fetching ahead.
      constexpr std::int64_t kLine = 64 / sizeof(element), kAhead = 8;
      b += col0;
      for (std::int64_t i = 0; i < depth; ++i, b += args_.b_row_stride) {
        const bool more = i + kAhead < depth;
        for (std::int64_t c = 0; more && c < cols; c += kLine) {
          __builtin_prefetch(b + kAhead * args_.b_row_stride + c);
        }
        std::int64_t n = 0;
        for (float* to = panels_ + i * width; n + width <= cols; n += width) {
          for (int j = 0; j < kTileCols && j < width; j += kLanes) {
            Simd::storeu(to + j, Simd::load(b + n + j));
          }
          to += plan_.slice * width;
        }
        if (n < cols) convert_row(b + n, cols - n, panel(n) + i * width);
      }
    });
  }

  void pack_strip(std::int64_t row, std::int64_t rows, std::int64_t k, std::int64_t depth,
                  std::int64_t padded) const {
    constexpr std::int64_t kStride = FloatEngine::kRowStride;
    with_dtype(args_.a_dtype, [&](auto element) {
      const auto* a = static_cast<const decltype(element)*>(args_.a);
      for (std::int64_t r = 0; r < rows; ++r) {
        const auto* from = a + (row + r) * args_.a_row_stride + k * args_.a_col_stride;
        float* to = strip_ + r * kStride;
        if (args_.a_col_stride == 1) {
          convert_row(from, depth, to);
        } else {
          spread_row(from, args_.a_col_stride, depth, to, 1);
        }
        for (std::int64_t i = depth; i < padded; ++i) to[i] = 0.0f;
      }
    });
  }

  template <typename T>
  static void spread_row(const T* from, std::int64_t from_stride, std::int64_t n, float* to,
                         std::int64_t to_stride) {
    for (std::int64_t i = 0; i < n; ++i) to[i * to_stride] = to_float(from[i * from_stride]);
  }

  // Row `row` of out, which is row r of the tile.
  void store(std::int64_t row, std::int64_t r, std::int64_t col0, std::int64_t cols) const {
    with_dtype(args_.out_dtype, [&](auto element) {
      auto* to = static_cast<decltype(element)*>(args_.out) + row * args_.out_row_stride + col0;
      for (std::int64_t n = 0; n < cols; n += kLanes) {
        const float* from = sums(n / plan_.width * plan_.width, r) + n % plan_.width;
        const int count = static_cast<int>(min64(kLanes, cols - n));
        if (count == kLanes) {
          Simd::store(to + n, result(from, [&] { return Simd::load(to + n); }));
        } else {
          Simd::store_partial(
              to + n, result(from, [&] { return Simd::load_partial(to + n, count); }), count);
        }
      }
    });
  }

  template <typename Before>
  Simd::F result(const float* from, const Before& before) const {
    const Simd::F sum = Simd::loadu(from), alpha = Simd::set1(args_.alpha);
    return args_.accumulate ? Simd::fma(alpha, sum, before()) : Simd::mul(alpha, sum);
  }
};

inline Status dense_matmul(const MatmulIntoArgs& args, int num_threads) {
  const std::int64_t multiply_adds = args.m * args.n * args.k;
  num_threads = useful_threads(multiply_adds, num_threads);
  const DensePlan plan(args, num_threads);
  WorkQueue queue(plan.row_tiles * plan.col_tiles, 1);
  SharedStatus status;
  auto body = [&] {
    float* scratch = static_cast<float*>(thread_scratch(plan.bytes()));
    if (scratch == nullptr) return status.fail(kOutOfMemory);
    DenseTask task(args, plan, scratch);
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) task.compute(begin);
  };
  parallel(num_threads, matmul_nanoseconds(args), body);
  return status.get();
}

}  // namespace
}  // namespace qkern::cpu
