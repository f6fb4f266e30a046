// Matmuls over 4-bit weights by tiles: y = x W^T + bias and dx = dy W. A panel of W is decoded into
// the first-level cache, used for every row of the tile and dropped, so W never exists dequantised.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "kernels_multiply.h"
#include "kernels_panel.h"
#include "parallel.h"
#include "scratch.h"

namespace qkern::cpu {
namespace {

// Collects the first failure of a parallel region.
struct SharedStatus {
  const char* message = nullptr;

  void fail(const char* what) { __atomic_store_n(&message, what, __ATOMIC_RELAXED); }
  Status get() const { return Status{message}; }
};

// Below this many multiply-adds, waking a second thread costs more than it saves.
inline int useful_threads(std::int64_t multiply_adds, int num_threads) {
  return multiply_adds < (std::int64_t{1} << 16) ? 1 : num_threads;
}

constexpr const char* kOutOfMemory = "out of memory for the kernel's scratch";

// How a tile is multiplied: this one in float32 with fused multiply-adds. An engine's panel is
// [step / kInterleave][kParts][kTileCols][kInterleave] elements, steps being those of the
// contraction and parts what a weight is the sum of; its copy of x is [row][row_stride].
struct FloatEngine {
  using Element = float;
  static constexpr std::int64_t kDepth = 256;  // the most steps that a panel holds
  static constexpr int kInterleave = 1;
  static constexpr int kParts = 1;
  static constexpr std::int64_t kStripRows = Simd::kTileRows;  // multiplied at a time
  static constexpr int kRowMultiple = 1;                       // strips come in multiples of this
  static constexpr int kDepthMultiple = Simd::kTileSteps;      // so do steps; zeros past the end
  static constexpr std::int64_t kMaxTileRows = 384;
  static constexpr std::int64_t kMaxTileCols = 384;
  // Up to so many rows go to the kernels of kernels_vector*.h.
  static constexpr int kVectorRows = 8;
  static constexpr int kVectorRowsDx = 8;
  // A stride of a power of two would send the rows of x to the same cache sets.
  static constexpr int kRowStride = kDepth + 16;

  MultiplyFn<float> multiply[kStripRows + 1] = {};

  FloatEngine() { fill_multiply<kStripRows, kRowStride, FloatStep>(multiply); }

  static constexpr std::int64_t row_stride(std::int64_t) { return kRowStride; }
  template <typename T>
  static bool takes_in_place(const T*, std::int64_t, std::int64_t) {
    return false;
  }
  static Element element(float value, int) { return value; }
  static void store_steps(Element* panel, Simd::F first, Simd::F second) {
    Simd::storeu(panel, first);
    Simd::storeu(panel + kTileCols, second);
  }
  template <typename S = Simd>
  static void decode_rows(const std::uint8_t* first, const std::uint8_t* second,
                          typename S::Lut lut, float first_scale, float second_scale, Element* to) {
    if constexpr (S::kByteTables) {
      S::decode_two_rows(first, second, lut, first_scale, second_scale, to);
    } else {
      const typename S::Lut first_lut = S::scale_lut(lut, first_scale);
      const typename S::Lut second_lut = S::scale_lut(lut, second_scale);
      for (int half = 0; half < 2; ++half) {
        store_steps(to + half * kLanes, S::natural(first + half * kLanes / 2, first_lut),
                    S::natural(second + half * kLanes / 2, second_lut));
      }
    }
  }
  // n elements of a row of x, and zeros up to `padded`.
  template <typename T>
  static void copy_row(const T* from, std::int64_t n, std::int64_t padded, Element* to) {
    convert_row(from, n, to);
    for (std::int64_t i = n; i < padded; ++i) to[i] = 0.0f;
  }
  void run_strip(const Element* a, std::int64_t stride, std::int64_t rows, const Element* panel,
                 std::int64_t depth, float* c, bool accumulate) const {
    multiply[rows](a, stride, panel, depth, c, accumulate);
  }
};

// Begins a tile's sums with a term of low rank, in float32 whatever the engine. So the result is
// written once, where adding to it afterwards would read and write all of it again.
struct AddedTerm {
  static constexpr std::int64_t kDepth = FloatEngine::kDepth;
  static constexpr std::int64_t kStripRows = Simd::kTileRows;

  MultiplyFn<float> multiply[kStripRows + 1] = {};

  AddedTerm() { fill_by_broadcast<kStripRows, kAnyStride, FloatStep>(multiply); }

  // c[rows][kTileCols] of rows from row0 and `cols` columns from col0 on; the panel is scratch.
  void begin_sums(const LowRank& term, std::int64_t row0, std::int64_t rows, std::int64_t col0,
                  std::int64_t cols, float* panel, float* c) const {
    const std::int64_t stride = term.left_row_stride;
    for (std::int64_t k = 0; k < term.rank; k += kDepth) {
      const std::int64_t depth = min64(kDepth, term.rank - k);
      for (std::int64_t i = 0; i < depth; ++i) {
        const float* right =
            term.right + (k + i) * term.right_row_stride + col0 * term.right_col_stride;
        for (std::int64_t n = 0; n < kTileCols; ++n) {
          panel[i * kTileCols + n] =
              n < cols ? term.alpha * right[n * term.right_col_stride] : 0.0f;
        }
      }
      const float* left = term.left + row0 * stride + k;
      const std::int64_t strips = ceil_div(rows, kStripRows);
      for (std::int64_t s = 0; s < strips; ++s) {
        const std::int64_t begin = s * rows / strips, end = (s + 1) * rows / strips;
        multiply[end - begin](left + begin * stride, stride, panel, depth, c + begin * kTileCols,
                              k > 0);
      }
    }
  }
};

// Output [m, cols], contraction over depth. A tile of the output goes through the contraction in
// slices: x's part of a slice stays in the second-level cache while panel after panel passes.
struct TilePlan {
  std::int64_t m, cols, depth;
  std::int64_t rank;  // of the term that is added
  bool in_place;      // x is read where it lies; only the last, partial strip of rows is copied
  std::int64_t slice;
  std::int64_t tile_rows, tile_cols;
  std::int64_t row_tiles, col_tiles;
};

// Where a thread's tile lives in its scratch.
template <typename Engine>
struct TileScratch {
  std::int64_t panel_elements, x_elements, c_floats, scale_floats, added_floats;

  TileScratch(const TilePlan& plan, std::int64_t tile_rows)
      : panel_elements(plan.slice * Engine::kParts * kTileCols),
        x_elements((plan.in_place ? Engine::kStripRows : tile_rows) *
                   Engine::row_stride(plan.slice)),
        c_floats(tile_rows * plan.tile_cols),
        scale_floats(plan.slice * scale_stride(plan) + kLanes),
        added_floats(min64(plan.rank, AddedTerm::kDepth) * kTileCols) {}

  // Scales in a row of W within a tile of the input gradient.
  static std::int64_t scale_stride(const TilePlan& plan) {
    return plan.tile_cols / kMinBlockSize + 2;
  }
  std::size_t bytes() const {
    return static_cast<std::size_t>(panel_elements + x_elements) *
               sizeof(typename Engine::Element) +
           static_cast<std::size_t>(c_floats + scale_floats + added_floats) * sizeof(float);
  }
};

template <typename Engine>
TilePlan plan_tiles(std::int64_t m, std::int64_t cols, std::int64_t depth, std::int64_t rank,
                    bool in_place, int num_threads) {
  TilePlan plan{m, cols, depth, rank, in_place, 0, 0, 0, 0, 0};
  const std::int64_t slices = depth == 0 ? 1 : ceil_div(depth, Engine::kDepth);
  plan.slice = round_up(ceil_div(depth, slices), kMinBlockSize);
  // As many column tiles as divide evenly among the threads; but x is copied once for each, so with
  // many threads rows are divided too.
  const std::int64_t share = max64(ceil_div(cols, num_threads), min64(cols, 4 * kMinBlockSize));
  const std::int64_t tiles = ceil_div(cols, share) * ceil_div(share, Engine::kMaxTileCols);
  plan.tile_cols = round_up(ceil_div(cols, tiles), kTileCols);
  plan.col_tiles = ceil_div(cols, plan.tile_cols);
  // Tall tiles, since W is decoded once for each.
  const std::size_t fixed = TileScratch<Engine>(plan, 0).bytes();
  const std::size_t per_row = TileScratch<Engine>(plan, 1).bytes() - fixed;
  const auto fit = static_cast<std::int64_t>((kScratchLimit - fixed) / per_row);
  const std::int64_t most =
      min64(fit, Engine::kMaxTileRows) / Engine::kRowMultiple * Engine::kRowMultiple;
  const std::int64_t idle = ceil_div(num_threads, plan.col_tiles);
  const std::int64_t wanted = min64(idle, ceil_div(m, Engine::kStripRows));
  plan.row_tiles = max64(ceil_div(m, most), wanted);
  plan.tile_rows = round_up(ceil_div(m, plan.row_tiles), Engine::kRowMultiple);
  plan.row_tiles = ceil_div(m, plan.tile_rows);
  return plan;
}

template <typename T>
void store_row(const float* from, const T* bias, std::int64_t n, T* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Simd::F value = Simd::loadu(from + i);
    if (bias != nullptr) value = Simd::add(value, Simd::load(bias + i));
    Simd::store(to + i, value);
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    Simd::F value = Simd::load_partial(from + i, rest);
    if (bias != nullptr) value = Simd::add(value, Simd::load_partial(bias + i, rest));
    Simd::store_partial(to + i, value, rest);
  }
}

template <typename Engine, typename T, bool kForward>
class TileTask {
 public:
  using Element = typename Engine::Element;

  TileTask(const Linear4bitArgs& args, const TilePlan& plan, void* scratch)
      : args_(args), plan_(plan), fast_(rows_are_blocks(args.weight)) {
    const TileScratch<Engine> layout(plan, plan.tile_rows);
    panel_ = static_cast<Element*>(scratch);
    copy_ = panel_ + layout.panel_elements;
    c_ = reinterpret_cast<float*>(copy_ + layout.x_elements);
    scales_ = c_ + layout.c_floats;
    added_panel_ = scales_ + layout.scale_floats;
  }

  void compute(std::int64_t tile) {
    // Tiles of the same rows follow each other: those rows of x are in the cache then.
    row0_ = tile / plan_.col_tiles * plan_.tile_rows;
    rows_ = min64(plan_.tile_rows, plan_.m - row0_);
    const std::int64_t col0 = tile % plan_.col_tiles * plan_.tile_cols;
    const std::int64_t cols = min64(plan_.tile_cols, plan_.cols - col0);
    for (std::int64_t n = 0; args_.added.rank > 0 && n < cols; n += kTileCols) {
      added_.begin_sums(args_.added, row0_, rows_, col0 + n, min64(kTileCols, cols - n),
                        added_panel_, c_ + n * plan_.tile_rows);
    }
    std::int64_t k = 0;
    do {
      const std::int64_t depth = min64(plan_.slice, plan_.depth - k);
      const std::int64_t padded = round_up(depth, Engine::kDepthMultiple);
      copy_x(k, depth, padded);
      if (!kForward && fast_) restore_scales(k, depth, col0, cols);
      for (std::int64_t n = 0; n < cols; n += kTileCols) {
        const std::int64_t panel_cols = min64(kTileCols, cols - n);
        decode(col0, n, panel_cols, k, depth, padded);
        prefetch_x(k + plan_.slice, n, cols);
        multiply(col0, n, panel_cols, k, padded);
      }
      k += plan_.slice;
    } while (k < plan_.depth);
  }

 private:
  const Linear4bitArgs& args_;
  const TilePlan& plan_;
  const Engine engine_;
  bool fast_;
  Element* panel_;  // [slice / kInterleave][kParts][kTileCols][kInterleave]
  Element* copy_;   // [rows][row_stride]
  float* c_;        // [tile_cols / kTileCols][tile_rows][kTileCols]
  float* scales_;   // [slice][scale_stride]; input gradient only
  const AddedTerm added_;
  float* added_panel_;
  std::int64_t row0_ = 0, rows_ = 0;

  const T* x() const { return static_cast<const T*>(args_.x) + row0_ * args_.x_row_stride; }
  // Rows from here on are copied.
  std::int64_t first_copied() const {
    return plan_.in_place ? rows_ / Engine::kStripRows * Engine::kStripRows : 0;
  }

  void copy_x(std::int64_t k, std::int64_t depth, std::int64_t padded) const {
    Element* to = copy_;
    for (std::int64_t r = first_copied(); r < rows_; ++r) {
      Engine::copy_row(x() + r * args_.x_row_stride + k, depth, padded, to);
      to += Engine::row_stride(plan_.slice);
    }
  }

  // A share of x's next slice for each panel of this one.
  void prefetch_x(std::int64_t k, std::int64_t n, std::int64_t cols) const {
    constexpr std::int64_t kLine = 64 / sizeof(T);
    const std::int64_t depth = min64(plan_.slice, plan_.depth - k);
    const std::int64_t end = rows_ * min64(n + kTileCols, cols) / cols;
    for (std::int64_t r = rows_ * n / cols; r < end; ++r) {
      for (std::int64_t i = 0; i < depth; i += kLine) {
        __builtin_prefetch(x() + r * args_.x_row_stride + k + i, 0, 2);
      }
    }
  }

  void restore_scales(std::int64_t row0, std::int64_t rows, std::int64_t col0,
                      std::int64_t cols) const {
    const Weight4bit& weight = args_.weight;
    const std::int64_t row_blocks = weight.cols / weight.block_size;
    const std::int64_t block0 = col0 / weight.block_size;
    const std::int64_t blocks = ceil_div(col0 + cols, weight.block_size) - block0;
    const std::int64_t stride = TileScratch<Engine>::scale_stride(plan_);
    for (std::int64_t r = 0; r < rows; ++r) {
      load_scales(weight, (row0 + r) * row_blocks + block0, blocks, scales_ + r * stride);
    }
  }

  // Columns [col0 + n, col0 + n + cols) of the output, steps [k, k + depth).
  void decode(std::int64_t col0, std::int64_t n, std::int64_t cols, std::int64_t k,
              std::int64_t depth, std::int64_t padded) const {
    const Weight4bit& weight = args_.weight;
    if (!fast_ || padded != depth) {
      const std::int64_t elements = padded * Engine::kParts * kTileCols;
      std::memset(panel_, 0, static_cast<std::size_t>(elements) * sizeof(Element));
    }
    if (!fast_) {
      kForward ? decode_panel_any<Engine, true>(weight, col0 + n, cols, k, depth, panel_)
               : decode_panel_any<Engine, false>(weight, k, depth, col0 + n, cols, panel_);
    } else if constexpr (kForward) {
      decode_panel_forward<Engine>(weight, col0 + n, cols, k, depth, panel_);
    } else {
      const std::int64_t block = (col0 + n) / weight.block_size - col0 / weight.block_size;
      decode_panel_dx<Engine>(weight, k, depth, col0 + n, scales_ + block,
                              TileScratch<Engine>::scale_stride(plan_), panel_);
    }
  }

  void multiply(std::int64_t col0, std::int64_t n, std::int64_t cols, std::int64_t k,
                std::int64_t padded) const {
    const T* bias = static_cast<const T*>(args_.bias);
    T* y = static_cast<T*>(args_.y) + row0_ * plan_.cols + col0 + n;
    if (bias != nullptr) bias += col0 + n;
    const bool last = k + plan_.slice >= plan_.depth, begun = k > 0 || args_.added.rank > 0;
    // Registers are filled evenly: 16 rows go as 8 + 8, not as 14 + 2.
    const std::int64_t strips = ceil_div(rows_, Engine::kStripRows);
    for (std::int64_t s = 0; s < strips; ++s) {
      const std::int64_t begin = strip_begin(s, strips), end = strip_begin(s + 1, strips);
      float* c = c_ + (n / kTileCols * plan_.tile_rows + begin) * kTileCols;
      const std::int64_t copied = begin - first_copied();
      if (plan_.in_place && copied < 0) {
        // Only where T is Element.
        const auto* from = reinterpret_cast<const Element*>(x() + begin * args_.x_row_stride + k);
        engine_.run_strip(from, args_.x_row_stride, end - begin, panel_, padded, c, begun);
      } else {
        const std::int64_t stride = Engine::row_stride(plan_.slice);
        engine_.run_strip(copy_ + copied * stride, stride, end - begin, panel_, padded, c, begun);
      }
      if (!last) continue;
      for (std::int64_t r = begin; r < end; ++r) {
        store_row(c + (r - begin) * kTileCols, bias, cols, y + r * plan_.cols);
      }
    }
  }

  std::int64_t strip_begin(std::int64_t strip, std::int64_t strips) const {
    return Engine::kRowMultiple == 1 ? strip * rows_ / strips
                                     : min64(strip * Engine::kStripRows, rows_);
  }
};

template <typename Engine, typename T, bool kForward>
Status linear_tiled(const Linear4bitArgs& args, int num_threads) {
  const std::int64_t cols = kForward ? args.weight.rows : args.weight.cols;
  const std::int64_t depth = kForward ? args.weight.cols : args.weight.rows;
  const bool in_place =
      Engine::takes_in_place(static_cast<const T*>(args.x), args.x_row_stride, depth);
  const TilePlan plan =
      plan_tiles<Engine>(args.m, cols, depth, args.added.rank, in_place, num_threads);
  const std::size_t bytes = TileScratch<Engine>(plan, plan.tile_rows).bytes();
  WorkQueue queue(plan.row_tiles * plan.col_tiles, 1);
  SharedStatus status;
  auto body = [&] {
    void* scratch = thread_scratch(bytes);
    if (scratch == nullptr) return status.fail(kOutOfMemory);
    TileTask<Engine, T, kForward> task(args, plan, scratch);
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) task.compute(begin);
  };
  parallel(num_threads, linear_nanoseconds(args), body);
  return status.get();
}

}  // namespace
}  // namespace qkern::cpu
