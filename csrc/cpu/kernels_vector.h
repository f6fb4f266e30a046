// y = x W^T + bias for a few rows of x: the decoded weights stay in registers.
#pragma once

#include <cstdint>

#include "kernels_panel.h"
#include "kernels_tiled.h"
#include "parallel.h"
#include "scratch.h"

namespace qkern::cpu {
namespace {

constexpr int kMaxVectorRows = 8;
constexpr std::int64_t kMaxStreams = 4;  // rows of W read side by side
constexpr std::int64_t kVectorPanelFloats = std::int64_t{1} << 17;
constexpr std::int64_t kSegmentUnit = 4096;  // segments are multiples of it
constexpr std::int64_t kStripFloats = 5120;  // of x: it stays in the first-level cache
// Scales that are restored at a time: those of many short rows of W, so that the work per row is
// small, and few enough to stay in the first-level cache too.
constexpr std::int64_t kScalesAtOnce = 1024;
constexpr std::int64_t kLineBytes = 64;  // that a prefetch brings
constexpr std::int64_t kBytesAhead = 4096;
// expand_scales reads a whole register from any scale.
constexpr std::int64_t kScalePadding = kLanes;

// Scales of x that are made of smaller magnitudes may not be normal numbers; see the kernels that
// take x as integers.
constexpr float kLeastMagnitude = 0x1p-90f;

// A segment of the contraction, short enough that all rows of x fit in the scratch.
struct Segment {
  std::int64_t k0, length;
  std::int64_t chunks;  // whole and partial
  std::int64_t blocks;
};

// Chunks of a segment, [begin, end), that are summed for many rows of W before the next.
struct Strip {
  std::int64_t begin, end;
  std::int64_t block0, blocks;  // of the segment's
  std::int64_t ahead;           // how many groups of rows of W are fetched ahead
};

// How a register of words becomes registers of weights: in steps, kExposed registers each, and
// which elements of x these multiply. As for panels, unless Simd has an order of its own for sums.
template <typename S, bool kOwn = S::kOwnOrder>
struct OrderOf {
  static constexpr int kExposed = S::kExposed;
  using Lut = typename S::Lut;

  static Lut make_lut(const float* table) { return S::make_lut(table); }
  template <int kStep>
  static void expose(const Lut& lut, Simd::I words, Simd::F (&w)[kExposed]) {
    S::template expose<kStep>(lut, words, w);
  }
  static Simd::F gather(const float* chunk, int step, int i) {
    // Shift 4j exposes the low nibble of byte j / 2 for even j: the byte's second element.
    const int j = step + i * kSteps;
    return S::gather_stride8(chunk + (j ^ 1));
  }
};
template <typename S>
struct OrderOf<S, true> : S::Order {};

using Order = OrderOf<Simd>;
constexpr int kOrderSteps = static_cast<int>(kWordCodes) / Order::kExposed;

// x in the order in which steps expose the codes: [chunk][step][register][lane], zeros past the
// end, so that the weights need no shuffling beyond the lookup. Chunks are `chunk_stride` apart.
template <typename T>
void permute_row(const T* x, const Segment& segment, std::int64_t chunk_stride, float* out) {
  float values[kChunk];
  for (std::int64_t c = 0; c < segment.chunks; ++c) {
    const std::int64_t n = min64(kChunk, segment.length - c * kChunk);
    convert_row(x + c * kChunk, n, values);
    for (std::int64_t i = n; i < kChunk; ++i) values[i] = 0.0f;
    float* to = out + c * chunk_stride;
    for (int step = 0; step < kOrderSteps; ++step) {
      for (int i = 0; i < Order::kExposed; ++i, to += kLanes) {
        Simd::storeu(to, Order::gather(values, step, i));
      }
    }
  }
}

// Where rows of x lie: one after the other, or together chunk by chunk, which leaves one address
// for all where a step reads many registers.
template <int kRows>
struct XLayout {
  static constexpr bool kTogether = Order::kExposed > 1;
  static constexpr std::int64_t kChunkStride = kTogether ? kRows * kChunk : kChunk;

  static std::int64_t row_stride(const Segment& segment) {
    return kTogether ? kChunk : segment.chunks * kChunk;
  }
};

struct FloatCodes {
  Order::Lut values;

  explicit FloatCodes(const Codebook& codes) : values(Order::make_lut(code_values(codes))) {}
  const Order::Lut& lut() const { return values; }
};

// Partial sums of kStreams rows of W with kRows rows of x. One register of words is eight
// registers of weights, exposed in kOrderSteps steps. With few rows of x the scale enters once a
// chunk, on the sums; with more it is cheaper on the weights, which all rows share.
template <int kRows, int kStreams>
struct VectorKernel {
  using Codes = FloatCodes;

  // Registers of words summed in one chain of additions; see multiply_tile.
  static constexpr std::int64_t kChainChunks = 32;
  static constexpr std::int64_t kXChunk = XLayout<kRows>::kChunkStride;
  static constexpr std::int64_t kXFloats = kRows * kChunk;  // of a chunk of all rows
  static constexpr int kPlannedRows = kRows;                // that segments and strips are for
  // Where two steps are all, a sum of one chain is short enough to begin anew each chunk.
  static constexpr bool kScaleWeights = kRows >= (kOrderSteps == 2 ? 5 : 4);
  static constexpr bool kTwoChains = kRows < 4;

  // As many as the registers hold the sums of.
  static constexpr int best_streams() {
    const int registers = (kTwoChains ? 3 : kScaleWeights ? 1 : 2) * kRows;
    const int fit = Simd::kVectorAccumulators / registers;
    return fit < 1 ? 1 : fit > kMaxStreams ? static_cast<int>(kMaxStreams) : fit;
  }

  // Row r of x.
  template <typename T>
  static void place_row(const T* x, const Codes&, const Segment& segment, int r, float* out) {
    permute_row(x, segment, kXChunk, out + r * XLayout<kRows>::row_stride(segment));
  }

  Simd::F total[kStreams][kRows];

  // Inlined by force: a call would take the sums through memory once a register of words.
  // kStart: the step's first register of weights starts the sums.
  template <int kStep, bool kStart>
  __attribute__((always_inline)) static void step(const Simd::I (&words)[kStreams],
                                                  const Order::Lut& lut, const float* x,
                                                  std::int64_t x_stride,
                                                  const Simd::F (&scale)[kStreams],
                                                  Simd::F (&sum)[kStreams][kRows]) {
    Simd::F w[kStreams][Order::kExposed];
    for (int s = 0; s < kStreams; ++s) {
      Order::expose<kStep>(lut, words[s], w[s]);
      for (int i = 0; i < Order::kExposed && kScaleWeights; ++i) {
        w[s][i] = Simd::mul(w[s][i], scale[s]);
      }
    }
    for (int i = 0; i < Order::kExposed; ++i) {
      for (int r = 0; r < kRows; ++r) {
        const Simd::F value =
            Simd::loadu(x + r * x_stride + (kStep * Order::kExposed + i) * kLanes);
        for (int s = 0; s < kStreams; ++s) {
          sum[s][r] =
              kStart && i == 0 ? Simd::mul(w[s][i], value) : Simd::fma(w[s][i], value, sum[s][r]);
        }
      }
    }
  }

  // Steps kStep and on, the sums taking turns.
  template <int kStep>
  __attribute__((always_inline)) static void steps(const Simd::I (&words)[kStreams],
                                                   const Order::Lut& lut, const float* x,
                                                   std::int64_t x_stride,
                                                   const Simd::F (&scale)[kStreams],
                                                   Simd::F (&sum)[kStreams][kRows],
                                                   Simd::F (&next)[kStreams][kRows]) {
    // Where two steps are all, the first of a chain starts it, and zeros need no register.
    constexpr bool kStart = kOrderSteps == 2 && !kScaleWeights && (kTwoChains || kStep == 0);
    step<kStep, kStart>(words, lut, x, x_stride, scale, sum);
    if constexpr (kStep + 1 < kOrderSteps) {
      steps<kStep + 1>(words, lut, x, x_stride, scale, next, sum);
    }
  }

  __attribute__((always_inline)) void add(const Simd::I (&words)[kStreams], const Order::Lut& lut,
                                          const float* x, const Segment& segment,
                                          const Simd::F (&scale)[kStreams]) {
    const std::int64_t x_stride = XLayout<kRows>::row_stride(segment);
    if constexpr (kScaleWeights) {
      steps<0>(words, lut, x, x_stride, scale, total, total);
    } else {
      // With few rows two chains a sum: one would wait for each multiply-add's latency.
      Simd::F even[kStreams][kRows], odd[kStreams][kRows];
      for (int s = 0; s < kStreams; ++s) {
        for (int r = 0; r < kRows; ++r) even[s][r] = odd[s][r] = Simd::zero();
      }
      steps<0>(words, lut, x, x_stride, scale, even, kTwoChains ? odd : even);
      for (int s = 0; s < kStreams; ++s) {
        for (int r = 0; r < kRows; ++r) {
          const Simd::F sum = kTwoChains ? Simd::add(even[s][r], odd[s][r]) : even[s][r];
          total[s][r] = Simd::fma(sum, scale[s], total[s][r]);
        }
      }
    }
  }
};

// out[s * kRows + r] += the sums of kStreams rows of W with kRows rows of x over a strip of the
// segment. `rows` and `x` are those of the segment, `scales` those of the strip. kOneScale: no
// chunk has more.
template <template <int, int> class Kernel, int kRows, int kStreams, bool kOneScale>
void sum_segment(const std::uint8_t* const* rows, std::int64_t row_bytes,
                 const float* const* scales, std::int64_t block_size,
                 const typename Kernel<kRows, kStreams>::Codes& codes, const float* x,
                 const Segment& segment, const Strip& strip, float* out) {
  using Sums = Kernel<kRows, kStreams>;
  const auto& lut = codes.lut();
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(block_size));
  const int lanes_per_scale =
      block_size / kWordCodes < kLanes ? static_cast<int>(block_size / kWordCodes) : kLanes;
  const Simd::I pattern = Simd::scale_pattern(lanes_per_scale);
  const std::int64_t whole = segment.length / kChunk;
  for (std::int64_t begin = strip.begin; begin < strip.end; begin += Sums::kChainChunks) {
    Sums sums;
    QKERN_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      QKERN_UNROLL
      for (int r = 0; r < kRows; ++r) sums.total[s][r] = Simd::zero();
    }
    Simd::I words[kStreams];
    Simd::F scale[kStreams];
    const std::int64_t end = min64(begin + Sums::kChainChunks, strip.end);
    std::int64_t c = begin;
    for (; c < min64(end, whole); ++c) {
      const std::int64_t block = ((c * kChunk) >> shift) - strip.block0;
      const bool new_line = kChunk / 2 >= kLineBytes || c * (kChunk / 2) % kLineBytes == 0;
      QKERN_UNROLL
      for (int s = 0; s < kStreams; ++s) {
        const std::uint8_t* from = rows[s] + c * (kChunk / 2);
        if (new_line) prefetch(from, strip.ahead * kStreams * row_bytes);
        words[s] = Simd::load_words(from);
        scale[s] = kOneScale ? Simd::set1(scales[s][block])
                             : Simd::expand_scales(scales[s] + block, pattern);
      }
      sums.add(words, lut, x + c * Sums::kXChunk, segment, scale);
    }
    if (c < end) {
      const int left = static_cast<int>((segment.length - c * kChunk) / kWordCodes);
      const std::int64_t block = ((c * kChunk) >> shift) - strip.block0;
      QKERN_UNROLL
      for (int s = 0; s < kStreams; ++s) {
        words[s] = Simd::load_words_partial(rows[s] + c * (kChunk / 2), left);
        // Nothing for the lanes past the end: what follows may be another row's NaN.
        scale[s] = Simd::first_lanes(Simd::expand_scales(scales[s] + block, pattern), left);
      }
      sums.add(words, lut, x + c * Sums::kXChunk, segment, scale);
    }
    QKERN_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      QKERN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        out[s * kRows + r] += Simd::reduce(sums.total[s][r]);
      }
    }
  }
}

struct VectorScratch {
  float* x;        // [kRows][chunks * kChunk] at most, as the kernel places it
  float* scales;   // [rows of W][blocks of a strip], and room for expand_scales
  float* partial;  // [run of W's rows][kRows], where the contraction has several segments
};

template <typename T, int kRows, template <int, int> class Kernel>
struct VectorTask {
  static constexpr int kStreams = Kernel<kRows, 1>::best_streams();
  static constexpr std::int64_t kRun = 256;  // rows of W between two passes over x
  static constexpr std::int64_t kStripChunks = kStripFloats / Kernel<kRows, 1>::kXFloats;
  static_assert(kStripChunks > 0, "a chunk fits");

  const Linear4bitArgs& args;
  typename Kernel<kRows, 1>::Codes codes;
  std::int64_t row_blocks, segment_length;
  VectorScratch scratch;

  // Rows [row, row + count) of W over a strip.
  void sum_rows(std::int64_t row, std::int64_t count, const Segment& segment, const Strip& strip,
                float* out) const {
    const Weight4bit& weight = args.weight;
    const std::int64_t block0 = segment.k0 / weight.block_size + strip.block0;
    if (strip.blocks == row_blocks) {
      load_scales(weight, row * row_blocks, count * row_blocks, scratch.scales);
    } else {
      for (std::int64_t i = 0; i < count; ++i) {
        load_scales(weight, (row + i) * row_blocks + block0, strip.blocks,
                    scratch.scales + i * strip.blocks);
      }
    }
    std::int64_t i = 0;
    for (; i + kStreams <= count; i += kStreams) {
      streams<kStreams>(row + i, scratch.scales + i * strip.blocks, segment, strip,
                        out + i * kRows);
    }
    for (; i < count; ++i) {
      streams<1>(row + i, scratch.scales + i * strip.blocks, segment, strip, out + i * kRows);
    }
  }

  template <int kCount>
  void streams(std::int64_t row, const float* first_scales, const Segment& segment,
               const Strip& strip, float* out) const {
    const Weight4bit& weight = args.weight;
    const std::uint8_t* rows[kCount];
    const float* scales[kCount];
    for (int s = 0; s < kCount; ++s) {
      rows[s] = weight.packed + (row + s) * (weight.cols / 2) + segment.k0 / 2;
      scales[s] = first_scales + s * strip.blocks;
    }
    const auto sum = weight.block_size >= kChunk ? sum_segment<Kernel, kRows, kCount, true>
                                                 : sum_segment<Kernel, kRows, kCount, false>;
    sum(rows, weight.cols / 2, scales, weight.block_size, codes, scratch.x, segment, strip, out);
  }

  void place_x(const Segment& segment) const {
    const T* x = static_cast<const T*>(args.x);
    for (int r = 0; r < kRows; ++r) {
      Kernel<kRows, 1>::place_row(x + r * args.x_row_stride + segment.k0, codes, segment, r,
                                  scratch.x);
    }
  }

  Segment segment_at(std::int64_t k0) const {
    const std::int64_t length = min64(segment_length, args.weight.cols - k0);
    return {k0, length, ceil_div(length, kChunk), ceil_div(length, args.weight.block_size)};
  }

  // Of `strips` of about the same length, number n.
  Strip strip_of(const Segment& segment, std::int64_t n, std::int64_t strips) const {
    const std::int64_t begin = n * segment.chunks / strips;
    const std::int64_t end = (n + 1) * segment.chunks / strips;
    const std::int64_t block0 = begin * kChunk / args.weight.block_size;
    const std::int64_t stop = min64(end * kChunk, segment.length);
    // As many as make about a whole row, or several short ones: memory takes that long to answer.
    const std::int64_t ahead = kBytesAhead / (kStreams * args.weight.cols / 2);
    return {begin, end, block0, ceil_div(stop, args.weight.block_size) - block0,
            max64(strips, ahead)};
  }

  void run_rows(std::int64_t begin, std::int64_t end) const {
    const bool single = segment_length >= args.weight.cols;
    for (std::int64_t row0 = begin; row0 < end; row0 += kRun) {
      const std::int64_t rows = min64(kRun, end - row0);
      for (std::int64_t i = 0; i < rows * kRows; ++i) scratch.partial[i] = 0.0f;
      for (std::int64_t k0 = 0; k0 < args.weight.cols; k0 += segment_length) {
        const Segment segment = segment_at(k0);
        if (!single) place_x(segment);
        const std::int64_t strips = ceil_div(segment.chunks, kStripChunks);
        for (std::int64_t n = 0; n < strips; ++n) {
          const Strip strip = strip_of(segment, n, strips);
          const std::int64_t step = max64(kScalesAtOnce / (strip.blocks * kStreams), 1) * kStreams;
          for (std::int64_t i = 0; i < rows; i += step) {
            sum_rows(row0 + i, min64(step, rows - i), segment, strip, scratch.partial + i * kRows);
          }
        }
      }
      store(row0, rows);
    }
  }

  void store(std::int64_t row0, std::int64_t rows) const {
    const T* bias = static_cast<const T*>(args.bias);
    T* y = static_cast<T*>(args.y);
    for (int r = 0; r < kRows; ++r) {
      for (std::int64_t i = 0; i < rows; ++i) {
        float value = scratch.partial[i * kRows + r];
        if (bias != nullptr) value += to_float(bias[row0 + i]);
        y[r * args.weight.rows + row0 + i] = from_float<T>(value);
      }
    }
  }
};

template <typename T, int kRows, template <int, int> class Kernel>
struct ForwardVectorBy {
  static Status run(const Linear4bitArgs& args, int num_threads) {
    using Task = VectorTask<T, kRows, Kernel>;
    const Weight4bit& weight = args.weight;
    // Segments start on whole blocks and whole registers of words. Both sizes are powers of two, so
    // a mask rounds down to multiples of the larger one.
    constexpr std::int64_t kMostSegment = kVectorPanelFloats / Kernel<kRows, 1>::kPlannedRows;
    static_assert(kMostSegment >= kMaxBlockSize && kSegmentUnit % kChunk == 0, "a unit fits");
    const std::int64_t whole_segment = kMostSegment & -max64(kSegmentUnit, weight.block_size);
    const std::int64_t segment_length = min64(whole_segment, weight.cols);
    const std::int64_t x_floats = kRows * ceil_div(segment_length, kChunk) * kChunk;
    const std::int64_t most_blocks = ceil_div(segment_length, weight.block_size);
    const std::int64_t scale_floats =
        max64(kScalesAtOnce, Task::kStreams * most_blocks) + kScalePadding;
    const std::int64_t floats = x_floats + scale_floats + Task::kRun * kRows;

    const std::int64_t grain =
        ceil_div(ceil_div(weight.rows, std::int64_t{8} * num_threads), kMaxStreams) * kMaxStreams;
    PartedQueue queue(weight.rows, grain, num_threads);
    SharedStatus status;
    auto body = [&] {
      float* scratch =
          static_cast<float*>(thread_scratch(static_cast<std::size_t>(floats) * sizeof(float)));
      if (scratch == nullptr) return status.fail(kOutOfMemory);
      const VectorScratch parts{scratch, scratch + x_floats, scratch + x_floats + scale_floats};
      const Task task{args, typename Kernel<kRows, 1>::Codes(weight.codes),
                      weight.cols / weight.block_size, segment_length, parts};
      if (segment_length >= weight.cols) task.place_x(task.segment_at(0));
      PartedQueue::Reader reader(queue);
      std::int64_t begin, end;
      while (reader.next(&begin, &end)) task.run_rows(begin, end);
    };
    parallel(num_threads, linear_nanoseconds(args), body);
    return status.get();
  }
};

template <typename T, int kRows>
using ForwardVector = ForwardVectorBy<T, kRows, VectorKernel>;

// The kernel for the number of rows at hand.
template <template <typename, int> class Kernel, typename T, int kRows>
struct VectorTable {
  static Status run(const Linear4bitArgs& args, int num_threads) {
    if (args.m == kRows) return Kernel<T, kRows>::run(args, num_threads);
    return VectorTable<Kernel, T, kRows - 1>::run(args, num_threads);
  }
};
template <template <typename, int> class Kernel, typename T>
struct VectorTable<Kernel, T, 1> {
  static Status run(const Linear4bitArgs& args, int num_threads) {
    return Kernel<T, 1>::run(args, num_threads);
  }
};

}  // namespace
}  // namespace qkern::cpu
