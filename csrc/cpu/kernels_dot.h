// y = x W^T + bias for a few rows of 16-bit x, by dot products of 16-bit integers: twice as many
// products an instruction as float32, or four, and decoding takes fewer look-ups.
#pragma once

#include <cstdint>

// Dot, where an isa_*.cpp has not included another.
#ifndef QKERN_HAS_DOT
#include "dot_avx512.h"
#endif

#include "kernels.h"

namespace qkern::cpu {
namespace {

// x as integers has this magnitude at most, and the codes kMostCode: eight products of each stay
// below 2^31.
constexpr float kMostX = 32767.0f;
constexpr float kMostCode = 8191.0f;
static_assert(8.0 * kMostX * kMostCode < 2147483648.0, "a chunk's sums are 32-bit integers");

// A format's codes times a factor, as integers.
struct IntegerCodes {
  float factor;
  Simd::Lut16 integers;

  // NF4: of the integers up to kMostCode the one with the least root mean square error, 2^-14.8 of
  // the codes' own, where rounding weights to float16 has 2^-12.3. FP4: every value is exact.
  explicit IntegerCodes(const Codebook& codes)
      : factor(codes.format == kFormatNf4 ? 7854.0f : 8064.0f) {
    const float* values = code_values(codes);
    std::uint16_t table[16];
    for (int i = 0; i < 16; ++i) {
      const float scaled = values[i] * factor;
      table[i] = static_cast<std::uint16_t>(
          static_cast<std::int32_t>(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f));
    }
    integers = Simd::make_lut16(table);
  }
  Simd::Lut16 lut() const { return integers; }
};

// Partial sums of kStreams rows of W with kRows rows of x, as VectorKernel's. A lane's sum is of
// eight elements, which share a scale of W, and have one of their own in x: only an x beside one
// 128 times as large is rounded at all.
template <int kRows, int kStreams>
struct DotKernel {
  using Codes = IntegerCodes;

  // A chunk is one addition, so one chain takes a whole segment.
  static constexpr std::int64_t kChainChunks = kVectorPanelFloats / kChunk;
  // Of a chunk of x: integers [row][register][lane][2], then the lanes' scales [row][lane].
  static constexpr std::int64_t kXRow = std::int64_t{Dot::kRegisters} * kLanes;
  static constexpr std::int64_t kXScales = kRows * kXRow;
  static constexpr std::int64_t kXChunk = kXScales + std::int64_t{kRows} * kLanes;
  static constexpr std::int64_t kXFloats = kXChunk;
  static constexpr int kPlannedRows = kRows;
  static_assert(kXChunk <= kRows * kChunk, "takes no more room than x in float32");

  static constexpr int best_streams() { return Dot::streams(kRows); }

  template <typename T>
  static void place_row(const T* x, const Codes& codes, const Segment& segment, int r, float* out) {
    // The codes' factor goes into the scales of x, so that sums are never larger than they mean.
    const Simd::F unit = Simd::set1(kMostX * codes.factor);
    float values[kChunk];
    for (std::int64_t c = 0; c < segment.chunks; ++c) {
      const std::int64_t n = min64(kChunk, segment.length - c * kChunk);
      convert_row(x + c * kChunk, n, values);
      for (std::int64_t i = n; i < kChunk; ++i) values[i] = 0.0f;
      float* to = out + c * kXChunk;
      Simd::F element[kWordCodes];
      Simd::F largest = Simd::zero();
      for (int j = 0; j < kWordCodes; ++j) {
        element[j] = Dot::gather(values, j);
        largest = Dot::larger_magnitude(largest, element[j]);
      }
      // Below are zeros alone: see integers_are_exact_enough.
      const Simd::F factor =
          Dot::divide_where(largest, kLeastMagnitude, Simd::set1(kMostX), largest);
      for (int i = 0; i < Dot::kRegisters; ++i) {
        const Simd::F low = Simd::mul(element[Dot::low_element(i)], factor);
        const Simd::F high = Simd::mul(element[Dot::high_element(i)], factor);
        Dot::store(to + r * kXRow + i * kLanes,
                   Dot::pairs(Dot::to_integer(low), Dot::to_integer(high)));
      }
      Simd::storeu(to + kXScales + r * kLanes,
                   Dot::divide_where(largest, kLeastMagnitude, largest, unit));
    }
  }

  Simd::F total[kStreams][kRows];

  // All codes are decoded before any is multiplied, so that a row's integer sums live for a few
  // instructions only: registers hold the weights and the totals.
  __attribute__((always_inline)) void add(const Simd::I (&words)[kStreams], const Simd::Lut16& lut,
                                          const float* x, const Segment&,
                                          const Simd::F (&scale)[kStreams]) {
    Simd::I w[kStreams][Dot::kRegisters];
    for (int s = 0; s < kStreams; ++s) Dot::decode(lut, words[s], w[s]);
    for (int r = 0; r < kRows; ++r) {
      Simd::I sum[kStreams];
      for (int i = 0; i < Dot::kRegisters; ++i) {
        const Simd::I value = Dot::load(x + r * kXRow + i * kLanes);
        for (int s = 0; s < kStreams; ++s) {
          sum[s] =
              i == 0 ? Dot::multiply(w[s][i], value) : Dot::multiply_add(sum[s], w[s][i], value);
        }
      }
      const Simd::F x_scale = Simd::loadu(x + kXScales + r * kLanes);
      for (int s = 0; s < kStreams; ++s) {
        const Simd::F unscaled = Simd::mul(Dot::to_float(sum[s]), x_scale);
        total[s][r] = Simd::fma(unscaled, scale[s], total[s][r]);
      }
    }
  }
};

// Whether integers stand for every row of x well enough. In units of the weights' variance,
// rounding x to integers adds at most 2^-30 2/3 sum(x^2) to that of a result. Rounding weights to
// T, as the contract allows, would add r sum(x^2) over the x that meet weights other than zero,
// with r = 2^-18.6 for bfloat16 and 2^-24.6 for float16. So it is enough that
//   2^-30 2/3 sum(x^2) <= r n / 4 (kTypicalX rms(x))^2,
// which kTypicalX makes an equality. Three quarters of the nonzero x must be that large, because
// half of all may meet weights of zero. And none may be so small that its lane's scale is lost.
template <typename T>
constexpr float kTypicalX = 0x1p-5f;
template <>
constexpr float kTypicalX<Float16> = 0x1p-2f;

template <typename T>
bool integers_are_exact_enough(const Linear4bitArgs& args) {
  const std::int64_t cols = args.weight.cols;
  for (std::int64_t r = 0; r < args.m; ++r) {
    const T* row = static_cast<const T*>(args.x) + r * args.x_row_stride;
    const auto load = [&](std::int64_t i) {
      return i + kLanes <= cols ? Simd::load(row + i)
                                : Simd::load_partial(row + i, static_cast<int>(cols - i));
    };
    Simd::F squares = Simd::zero();
    for (std::int64_t i = 0; i < cols; i += kLanes) {
      const Simd::F x = load(i);
      squares = Simd::fma(x, x, squares);
    }
    const float square = Simd::reduce(squares) / static_cast<float>(cols);
    if (!(square < 0x1p120f)) return false;
    const float least_square = square * kTypicalX<T> * kTypicalX<T>;
    if (square != 0.0f && least_square < 0x1p-120f) return false;  // of too few bits
    const Simd::F typical = Simd::set1(least_square), least = Simd::set1(2.0f * kLeastMagnitude);
    std::int64_t nonzero = 0, large = 0, small = 0;
    for (std::int64_t i = 0; i < cols; i += kLanes) {
      const Simd::F x = load(i);
      const std::int64_t here = Dot::count_nonzero(x);
      nonzero += here;
      small += here - Dot::count_at_least(Dot::larger_magnitude(Simd::zero(), x), least);
      large += Dot::count_at_least(Simd::mul(x, x), typical);
    }
    if (small != 0 || 4 * large < 3 * nonzero) return false;
  }
  return true;
}

template <typename T, int kRows>
using ForwardDot = ForwardVectorBy<T, kRows, DotKernel>;

// Of 16-bit x. A codebook's values may need more bits in proportion than integers have.
template <typename Engine, typename T>
Status linear_4bit_dot(const Linear4bitArgs& args, int num_threads) {
  if (args.weight.codes.format != kFormatCustom && takes_vector_path(args, kMaxVectorRows) &&
      products_stay_in_range<T>(args) && integers_are_exact_enough<T>(args)) {
    return VectorTable<ForwardDot, T, kMaxVectorRows>::run(args, useful_threads(args, num_threads));
  }
  return linear_4bit<Engine, T>(args, num_threads);
}

// The table with these kernels for 16-bit x.
inline KernelTable with_dots(KernelTable table) {
  table.linear_4bit_int8[0] = linear_4bit_int8<float>;
  table.linear_4bit_int8[1] = linear_4bit_int8<BFloat16>;
  table.linear_4bit_int8[2] = linear_4bit_int8<Float16>;
  table.linear_4bit[static_cast<int>(DType::kBFloat16)] = linear_4bit_dot<FloatEngine, BFloat16>;
  table.linear_4bit[static_cast<int>(DType::kFloat16)] = linear_4bit_dot<FloatEngine, Float16>;
  return table;
}

}  // namespace
}  // namespace qkern::cpu
