// y = x W^T + bias for a few rows of 16-bit x, by VNNI's dot products of 16-bit integers: twice as
// many products an instruction as float32, and two for a decoded register.
#pragma once

#include <immintrin.h>

#include "simd_avx512.h"

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
  float unscaled(float sum) const { return sum / factor; }
};

// Partial sums of kStreams rows of W with kRows rows of x, as VectorKernel's. A register of packed
// words holds 32 words of 16 bits, of which each of four shifts exposes one code. So a lane's sum
// is of eight neighbours, which share a scale of W, and have one of their own in x: only an x
// beside one 128 times as large is rounded at all.
template <int kRows, int kStreams>
struct DotKernel {
  using Codes = IntegerCodes;

  // A chunk is one addition, so one chain takes a whole segment.
  static constexpr std::int64_t kChainChunks = kVectorPanelFloats / kChunk;
  static constexpr int kShifts = 4;
  // Of a chunk of x: integers [shift][row][lane][2], then the lanes' scales [row][lane].
  static constexpr std::int64_t kXScales = std::int64_t{kShifts} * kRows * kLanes;
  static constexpr std::int64_t kXChunk = kXScales + std::int64_t{kRows} * kLanes;
  static_assert(kXChunk <= kRows * kChunk, "takes no more room than x in float32");

  // As many as leave room for the sums of a chunk and those before it.
  static constexpr int best_streams() { return kRows == 1 ? 4 : kRows == 2 ? 3 : 2; }

  template <typename T>
  static void place_row(const T* x, const Segment& segment, int r, float* out) {
    float values[kChunk];
    for (std::int64_t c = 0; c < segment.chunks; ++c) {
      const std::int64_t n = min64(kChunk, segment.length - c * kChunk);
      convert_row(x + c * kChunk, n, values);
      for (std::int64_t i = n; i < kChunk; ++i) values[i] = 0.0f;
      float* to = out + c * kXChunk;
      // Lane p takes elements 8p + j.
      __m512 element[kWordCodes];
      __m512 largest = Simd::zero();
      for (int j = 0; j < kWordCodes; ++j) {
        element[j] = Simd::gather_stride8(values + j);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(element[j]));
      }
      // Of a row that is in range, such neighbours add nothing that its result could hold.
      const __mmask16 counts = _mm512_cmp_ps_mask(largest, Simd::set1(0x1p-100f), _CMP_GT_OQ);
      const __m512 most = Simd::set1(kMostX);
      const __m512 factor = _mm512_maskz_div_ps(counts, most, largest);
      __m512i integer[kWordCodes];
      for (int j = 0; j < kWordCodes; ++j) {
        integer[j] = _mm512_cvtps_epi32(Simd::mul(element[j], factor));
      }
      for (int s = 0; s < kShifts; ++s) {
        // A 16-bit word holds its codes 1, 0, 3, 2 from the lowest bits up.
        const __m512i low = _mm512_and_si512(integer[s ^ 1], _mm512_set1_epi32(0xffff));
        const __m512i high = _mm512_slli_epi32(integer[4 + (s ^ 1)], 16);
        _mm512_storeu_si512(to + (s * kRows + r) * kLanes, _mm512_or_si512(low, high));
      }
      Simd::storeu(to + kXScales + r * kLanes, _mm512_maskz_div_ps(counts, largest, most));
    }
  }

  Simd::F total[kStreams][kRows];

  using Words = Simd::I[kStreams];
  using Sums = Simd::I[kStreams][kRows];

  template <int kShift>
  __attribute__((always_inline)) static void step(const Words& words, const Simd::Lut16& lut,
                                                  const float* x, Sums& sum) {
    Simd::I w[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      const Simd::I index = kShift == 0 ? words[s] : _mm512_srli_epi16(words[s], 4 * kShift);
      w[s] = _mm512_permutexvar_epi16(index, lut);
    }
    for (int r = 0; r < kRows; ++r) {
      const Simd::I value = _mm512_loadu_si512(x + (kShift * kRows + r) * kLanes);
      for (int s = 0; s < kStreams; ++s) sum[s][r] = _mm512_dpwssd_epi32(sum[s][r], w[s], value);
    }
  }

  __attribute__((always_inline)) void add(const Words& words, const Simd::Lut16& lut,
                                          const float* x, const Segment&,
                                          const Simd::F (&scale)[kStreams]) {
    Sums sum;
    for (int s = 0; s < kStreams; ++s) {
      for (int r = 0; r < kRows; ++r) sum[s][r] = _mm512_setzero_si512();
    }
    step<0>(words, lut, x, sum);
    step<1>(words, lut, x, sum);
    step<2>(words, lut, x, sum);
    step<3>(words, lut, x, sum);
    for (int r = 0; r < kRows; ++r) {
      const Simd::F x_scale = Simd::loadu(x + kXScales + r * kLanes);
      for (int s = 0; s < kStreams; ++s) {
        const Simd::F unscaled = Simd::mul(_mm512_cvtepi32_ps(sum[s][r]), x_scale);
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
// which kTypicalX makes an equality. Half of the nonzero x must be that large, because half of
// those may meet weights of zero.
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
    const Simd::F typical = Simd::set1(square * kTypicalX<T> * kTypicalX<T>);
    std::int64_t nonzero = 0, large = 0;
    for (std::int64_t i = 0; i < cols; i += kLanes) {
      const Simd::F x = load(i);
      nonzero += __builtin_popcount(_mm512_cmp_ps_mask(x, Simd::zero(), _CMP_NEQ_UQ));
      large += __builtin_popcount(_mm512_cmp_ps_mask(Simd::mul(x, x), typical, _CMP_GE_OQ));
    }
    if (2 * large < nonzero) return false;
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

}  // namespace
}  // namespace qkern::cpu
