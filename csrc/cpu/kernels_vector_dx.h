// dx = dy W for a few rows of dy: weights are used as they are decoded, without a panel.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels_vector.h"

namespace qkern::cpu {
namespace {

// Where a chunk's registers lie in memory: in the order of the steps that expose them.
constexpr int step_order(int shift) { return shift % kSteps * Simd::kExposed + shift / kSteps; }

constexpr std::int64_t kStripCols = 2048;  // columns of W that a thread sums at a time
// Rows of W summed before the sums are added to the total; see multiply_tile.
constexpr std::int64_t kChainRows = 256;

static_assert(kStripCols % kChunk == 0 && (kStripCols & (kStripCols - 1)) == 0,
              "strips are whole, and a block is some of them or a part of one");

// Sums are kept in the order in which steps expose the codes: [row][chunk][step][register][lane].
struct DxScratch {
  float* sum;     // [kRows][strip], over kChainRows rows of W
  float* total;   // [kRows][strip]
  float* scales;  // [rows of W side by side][scale_stride]
};

// Adds kStreams rows of W, each times its element of dy, to the sums of kRows rows of dx.
template <int kRows, int kStreams>
struct DxKernel {
  // Rows of dx whose sums a step holds in registers at a time.
  static constexpr int kHeldRows = Simd::kExposed == 1 || kRows < 2 ? kRows : 2;

  // Step kStep for rows kRow0 and on of dx.
  template <int kStep, int kRow0>
  __attribute__((always_inline)) static void rows(const Simd::I (&words)[kStreams],
                                                  const Simd::Lut& lut,
                                                  const Simd::F (&factor)[kStreams][kRows],
                                                  float* sum, std::int64_t stride) {
    constexpr int kCount = kRows - kRow0 < kHeldRows ? kRows - kRow0 : kHeldRows;
    float* at = sum + kRow0 * stride + kStep * Simd::kExposed * kLanes;
    Simd::F acc[kCount][Simd::kExposed];
    for (int r = 0; r < kCount; ++r) {
      for (int i = 0; i < Simd::kExposed; ++i) {
        acc[r][i] = Simd::loadu(at + r * stride + i * kLanes);
      }
    }
    for (int s = 0; s < kStreams; ++s) {
      Simd::F w[Simd::kExposed];
      Simd::expose<kStep>(lut, words[s], w);
      for (int r = 0; r < kCount; ++r) {
        for (int i = 0; i < Simd::kExposed; ++i) {
          acc[r][i] = Simd::fma(w[i], factor[s][kRow0 + r], acc[r][i]);
        }
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int i = 0; i < Simd::kExposed; ++i) {
        Simd::storeu(at + r * stride + i * kLanes, acc[r][i]);
      }
    }
    if constexpr (kRow0 + kCount < kRows) {
      rows<kStep, kRow0 + kCount>(words, lut, factor, sum, stride);
    }
  }

  // Steps kStep and on.
  template <int kStep>
  __attribute__((always_inline)) static void steps(const Simd::I (&words)[kStreams],
                                                   const Simd::Lut& lut,
                                                   const Simd::F (&factor)[kStreams][kRows],
                                                   float* sum, std::int64_t stride) {
    rows<kStep, 0>(words, lut, factor, sum, stride);
    if constexpr (kStep + 1 < kSteps) steps<kStep + 1>(words, lut, factor, sum, stride);
  }

  // packed[s]: a row of W from the strip's first column; dy[s * kRows + r]: its factors.
  static void run(const std::uint8_t* const* packed, const float* const* scales, const float* dy,
                  std::int64_t block_size, std::int64_t row_bytes, std::int64_t cols,
                  const float* codes, float* sum, std::int64_t stride) {
    const Simd::Lut lut = Simd::make_lut(codes);
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(block_size));
    const int lanes_per_scale =
        block_size / kWordCodes < kLanes ? static_cast<int>(block_size / kWordCodes) : kLanes;
    const Simd::I pattern = Simd::scale_pattern(lanes_per_scale);
    for (std::int64_t c = 0; c < cols; c += kChunk) {
      const std::int64_t left = (cols - c) / kWordCodes;
      Simd::I words[kStreams];
      Simd::F factor[kStreams][kRows];
      for (int s = 0; s < kStreams; ++s) {
        const std::uint8_t* from = packed[s] + c / 2;
        prefetch(from, kStreams * row_bytes);
        words[s] = left >= kLanes ? Simd::load_words(from)
                                  : Simd::load_words_partial(from, static_cast<int>(left));
        const Simd::F scale = Simd::expand_scales(scales[s] + (c >> shift), pattern);
        for (int r = 0; r < kRows; ++r) {
          factor[s][r] = Simd::mul(scale, Simd::set1(dy[s * kRows + r]));
        }
      }
      steps<0>(words, lut, factor, sum + c, stride);
    }
  }
};

constexpr int dx_streams(int rows) {
  const int fit = Simd::kVectorFactors / rows;
  return fit < 1 ? 1 : fit > Simd::kFactorRows ? Simd::kFactorRows : fit;
}

template <typename T, int kRows>
struct DxTask {
  static constexpr int kStreams = dx_streams(kRows);

  const Linear4bitArgs& args;
  const float* codes;
  std::int64_t strip, scale_stride;
  DxScratch scratch;

  template <int kCount>
  void add_rows(std::int64_t row, std::int64_t col0, std::int64_t cols) const {
    const Weight4bit& weight = args.weight;
    const std::int64_t row_blocks = weight.cols / weight.block_size;
    const std::int64_t block0 = col0 / weight.block_size;
    const std::int64_t blocks = ceil_div(col0 + cols, weight.block_size) - block0;
    const T* dy = static_cast<const T*>(args.x);
    const std::uint8_t* rows[kCount];
    const float* scales[kCount];
    float factors[kCount * kRows];
    for (int s = 0; s < kCount; ++s) {
      rows[s] = weight.packed + (row + s) * (weight.cols / 2) + col0 / 2;
      float* to = scratch.scales + s * scale_stride;
      load_scales(weight, (row + s) * row_blocks + block0, blocks, to);
      for (std::int64_t i = 0; i < kScalePadding; ++i) to[blocks + i] = 0.0f;
      scales[s] = to;
      for (int r = 0; r < kRows; ++r) {
        factors[s * kRows + r] = to_float(dy[r * args.x_row_stride + row + s]);
      }
    }
    DxKernel<kRows, kCount>::run(rows, scales, factors, weight.block_size, weight.cols / 2, cols,
                                 codes, scratch.sum, strip);
  }

  void run_strip(std::int64_t col0) const {
    const std::int64_t cols = min64(strip, args.weight.cols - col0);
    const std::size_t bytes = static_cast<std::size_t>(kRows * strip) * sizeof(float);
    std::memset(scratch.total, 0, bytes);
    for (std::int64_t row0 = 0; row0 < args.weight.rows; row0 += kChainRows) {
      std::memset(scratch.sum, 0, bytes);
      const std::int64_t end = min64(row0 + kChainRows, args.weight.rows);
      std::int64_t row = row0;
      for (; row + kStreams <= end; row += kStreams) add_rows<kStreams>(row, col0, cols);
      for (; row < end; ++row) add_rows<1>(row, col0, cols);
      for (std::int64_t i = 0; i < kRows * strip; i += kLanes) {
        Simd::storeu(scratch.total + i,
                     Simd::add(Simd::loadu(scratch.total + i), Simd::loadu(scratch.sum + i)));
      }
    }
    T* dx = static_cast<T*>(args.y) + col0;
    for (int r = 0; r < kRows; ++r) {
      for (std::int64_t i = 0; i < cols; ++i) {
        const std::int64_t word = i % kChunk / kWordCodes;
        const int shift = static_cast<int>(i % kWordCodes ^ 1);
        const std::int64_t from = i / kChunk * kChunk + step_order(shift) * kLanes + word;
        dx[r * args.weight.cols + i] = from_float<T>(scratch.total[r * strip + from]);
      }
    }
  }
};

template <typename T, int kRows>
struct DxVector {
  static Status run(const Linear4bitArgs& args, int num_threads) {
    using Task = DxTask<T, kRows>;
    const Weight4bit& weight = args.weight;
    // Strips start on whole registers of words, and are whole blocks or lie within one: blocks are
    // counted from where a strip starts.
    const std::int64_t unit = min64(max64(weight.block_size, kChunk), kStripCols);
    const std::int64_t share = round_up(ceil_div(weight.cols, num_threads), unit);
    const std::int64_t strip = min64(share, kStripCols);
    const std::int64_t scale_stride = strip / kMinBlockSize + 1 + kScalePadding;
    const std::int64_t floats = 2 * kRows * strip + Task::kStreams * scale_stride;
    WorkQueue queue(ceil_div(weight.cols, strip), 1);
    SharedStatus status;
    auto body = [&] {
      float* scratch =
          static_cast<float*>(thread_scratch(static_cast<std::size_t>(floats) * sizeof(float)));
      if (scratch == nullptr) return status.fail(kOutOfMemory);
      const DxScratch parts{scratch, scratch + kRows * strip, scratch + 2 * kRows * strip};
      const Task task{args, code_values(weight.codes), strip, scale_stride, parts};
      std::int64_t begin, end;
      while (queue.next(&begin, &end)) task.run_strip(begin * strip);
    };
    parallel(num_threads, linear_nanoseconds(args), body);
    return status.get();
  }
};

}  // namespace
}  // namespace qkern::cpu
