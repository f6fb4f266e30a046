// quantize_absmax, double quantisation: subtract the mean of the scales, then 8-bit codes, 256 to a
// block. The sum is exact, in integers, so it does not depend on the order of summation.
#include "blockwise.cuh"

namespace qkern::cuda {
namespace {

constexpr int kSumThreads = 1024;
// A float is an integer below 2^24 times 2^(bin - 149), with bin below 254. A window spans 24 bins
// and its sum is cut into three pieces, the last 48 bins above the window's first.
constexpr int kBins = 254 + 48;
constexpr int kLimbs = (kBins + 64) / 32 + 2;

struct SumState {
  unsigned long long bins[kBins];  // two's complement
  std::uint32_t limbs[kLimbs];     // the whole sum in units of 2^-149, two's complement
  unsigned long long not_finite;   // how many terms
};

// A thread's sum of values whose exponents lie close together, as scales' do: exact in 64 bits.
class WindowSum {
 public:
  // `first`: the window begins around its exponent.
  QKERN_DEVICE explicit WindowSum(float first) : first_(window_of(bin_of(exponent_of(first)))) {}

  QKERN_DEVICE void add(float value, SumState& state) {
    const unsigned bits = __float_as_uint(value);
    const int exponent = exponent_of(value);
    if (exponent == 0xff) {
      atomicAdd(&state.not_finite, 1ull);
      return;
    }
    const long long mantissa =
        static_cast<long long>((bits & 0x7fffffu) | (exponent != 0 ? 0x800000u : 0u));
    const int bin = bin_of(exponent);
    // 47-bit terms, and at most 2^15 of them, leave the sum below 2^63.
    if (bin < first_ || bin >= first_ + kWindow || terms_ == kMaxTerms) {
      flush(state);
      first_ = window_of(bin);
    }
    const long long term = mantissa << (bin - first_);
    sum_ += (bits >> 31) != 0 ? -term : term;
    ++terms_;
  }

  QKERN_DEVICE void flush(SumState& state) {
    if (terms_ == 0) return;
    const unsigned long long low = static_cast<unsigned long long>(sum_) & 0xffffffu;
    const unsigned long long middle = static_cast<unsigned long long>(sum_ >> 24) & 0xffffffu;
    add_pieces(low, middle, sum_ >> 48, state);
    sum_ = 0;
    terms_ = 0;
  }

  // The sums of a warp, whose lanes all call this. 64-bit atomics in shared memory are loops, in
  // which each thread waits for all others; so lanes of one window, which are all of them unless
  // values differ by 2^12, add their pieces before.
  QKERN_DEVICE void flush_warp(SumState& state) {
    if (__all_sync(kAllLanes, first_ == __shfl_sync(kAllLanes, first_, 0)) == 0) {
      flush(state);
      return;
    }
    // 32 of 24 bits, and of 16, fit 32.
    const unsigned low = warp_sum(static_cast<unsigned>(sum_) & 0xffffffu);
    const unsigned middle = warp_sum(static_cast<unsigned>(sum_ >> 24) & 0xffffffu);
    const int high = static_cast<int>(warp_sum(static_cast<unsigned>(sum_ >> 48)));
    if (threadIdx.x % kWarp != 0) return;
    add_pieces(low, middle, high, state);
  }

 private:
  // Integer atomics: exact, so the order in which threads come does not matter.
  QKERN_DEVICE void add_pieces(unsigned long long low, unsigned long long middle, long long high,
                               SumState& state) const {
    atomicAdd(&state.bins[first_], low);
    atomicAdd(&state.bins[first_ + 24], middle);
    atomicAdd(&state.bins[first_ + 48], static_cast<unsigned long long>(high));
  }

  QKERN_DEVICE static int exponent_of(float value) {
    return static_cast<int>((__float_as_uint(value) >> 23) & 0xffu);
  }
  QKERN_DEVICE static int bin_of(int exponent) { return exponent != 0 ? exponent - 1 : 0; }
  QKERN_DEVICE static int window_of(int bin) { return bin < kWindow / 2 ? 0 : bin - kWindow / 2; }

  static constexpr int kWindow = 24;
  static constexpr int kMaxTerms = 1 << 15;
  int first_;
  int terms_ = 0;
  long long sum_ = 0;
};

// limbs += value * 2^shift
QKERN_DEVICE void add_shifted(std::uint32_t* limbs, long long value, int shift) {
  if (value == 0) return;
  const std::uint32_t fill = value < 0 ? 0xffffffffu : 0u;
  const int offset = shift % 32;
  const unsigned long long low = static_cast<unsigned long long>(value) << offset;
  const std::uint32_t parts[3] = {
      static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(low >> 32),
      offset == 0 ? fill : static_cast<std::uint32_t>(value >> (64 - offset))};
  unsigned long long carry = 0;
  const int first = shift / 32;
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    carry += static_cast<unsigned long long>(limbs[first + part]) + parts[part];
    limbs[first + part] = static_cast<std::uint32_t>(carry);
    carry >>= 32;
  }
  for (int i = first + 3; i < kLimbs; ++i) {
    carry += static_cast<unsigned long long>(limbs[i]) + fill;
    limbs[i] = static_cast<std::uint32_t>(carry);
    carry >>= 32;
  }
}

QKERN_DEVICE unsigned limb_bit(const std::uint32_t* limbs, int i) {
  return (limbs[i / 32] >> (i % 32)) & 1u;
}

// The magnitude of limbs, rounded once to double, ties to even.
QKERN_DEVICE double round_limbs(const std::uint32_t* limbs) {
  int top = kLimbs * 32 - 1;
  while (top >= 0 && limb_bit(limbs, top) == 0) --top;
  if (top < 0) return 0.0;
  constexpr int kMantissa = 53;
  const int lowest = top >= kMantissa ? top - kMantissa + 1 : 0;
  unsigned long long mantissa = 0;
  for (int i = top; i >= lowest; --i) mantissa = mantissa << 1 | limb_bit(limbs, i);
  if (lowest > 0 && limb_bit(limbs, lowest - 1) != 0) {
    bool up = (mantissa & 1u) != 0;
    for (int i = 0; i < lowest - 1 && !up; ++i) up = limb_bit(limbs, i) != 0;
    mantissa += up ? 1 : 0;
  }
  return ldexp(static_cast<double>(mantissa), lowest - 149);
}

QKERN_DEVICE double round_sum(SumState& state) {
  for (int i = 0; i < kLimbs; ++i) state.limbs[i] = 0;
  for (int i = 0; i < kBins; ++i) {
    add_shifted(state.limbs, static_cast<long long>(state.bins[i]), i);
  }
  const bool negative = (state.limbs[kLimbs - 1] >> 31) != 0;
  if (negative) {
    unsigned long long carry = 1;
    for (int i = 0; i < kLimbs; ++i) {
      carry += static_cast<std::uint32_t>(~state.limbs[i]);
      state.limbs[i] = static_cast<std::uint32_t>(carry);
      carry >>= 32;
    }
  }
  const double magnitude = round_limbs(state.limbs);
  return negative ? -magnitude : magnitude;
}

// One block: the scales of the largest layers are a few megabytes, read once per quantisation.
QKERN_KERNEL(kSumThreads, 1)
absmax_mean_kernel(const float* __restrict__ absmax, std::int64_t numel,
                   float* __restrict__ nested_offset) {
  QKERN_SHARED(SumState, state);
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSumThreads) state.bins[i] = 0;
  if (threadIdx.x == 0) state.not_finite = 0;
  __syncthreads();
  WindowSum sum(numel > 0 ? absmax[0] : 0.0f);
  const std::int64_t vectors = is_aligned16(absmax) ? numel / 4 : 0;
  for (std::int64_t i = threadIdx.x; i < vectors; i += kSumThreads) {
    const uint4 bits = load_global16(absmax + 4 * i);
    sum.add(__uint_as_float(bits.x), state);
    sum.add(__uint_as_float(bits.y), state);
    sum.add(__uint_as_float(bits.z), state);
    sum.add(__uint_as_float(bits.w), state);
  }
  for (std::int64_t i = 4 * vectors + threadIdx.x; i < numel; i += kSumThreads) {
    sum.add(absmax[i], state);
  }
  sum.flush_warp(state);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const double mean = numel == 0 ? 0.0 : round_sum(state) / static_cast<double>(numel);
  *nested_offset =
      state.not_finite != 0 ? __uint_as_float(kQuietNanBits) : static_cast<float>(mean);
}

struct Differences {
  const float* absmax;
  std::int64_t numel;
  float offset;

  QKERN_DEVICE void load(std::int64_t start, float (&out)[kLaneValues]) const {
    const TensorValues<float> values{absmax, numel, is_aligned16(absmax)};
    values.load(start, out);
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      // Past the end stays zero, which no block's absmax notices.
      out[i] = start + i < numel ? __fsub_rn(out[i], offset) : 0.0f;
    }
  }
};

// The smallest code that restores to no negative scale, or the last. Restored values ascend with
// the code, since rounding keeps an order.
QKERN_DEVICE unsigned least_code(float nested_absmax, float offset) {
  const auto is_negative = [&](unsigned code) {
    const float value = __ldg(kDeviceMapSigned.values + code);
    return __fadd_rn(__fmul_rn(value, nested_absmax), offset) < 0.0f;
  };
  unsigned least = 0;
#ifdef QKERN_CODEC_SELECT
  for (unsigned code = 0; code < 255; ++code) least += is_negative(code) ? 1 : 0;
#else
  if (!is_negative(0)) return least;
  for (unsigned step = 128; step > 0; step /= 2) least += is_negative(least + step - 1) ? step : 0;
#endif
  return least;
}

struct ScaleEncoder {
  ByteEncoder bytes;
  float offset;

  QKERN_DEVICE void store(std::int64_t start, int count, const float (&x)[kLaneValues],
                          float absmax, float reciprocal) const {
    bytes.store_from(least_code(absmax, offset), start, count, x, reciprocal);
  }
};

QKERN_KERNEL(kQuantizeThreads, 1)
quantize_absmax_kernel(const float* __restrict__ absmax, BlockPlan plan,
                       const float* __restrict__ nested_offset, std::uint8_t* __restrict__ codes,
                       float* __restrict__ nested_absmax) {
  QKERN_SHARED(ByteThresholds, thresholds);
  stage_thresholds(kDeviceMapSigned.values, thresholds);
  __syncthreads();
  const Differences input{absmax, plan.numel, *nested_offset};
  const ScaleEncoder encoder{{thresholds.values, codes, is_aligned16(codes)}, input.offset};
  quantize_blocks(plan, input, encoder, nested_absmax);
}

}  // namespace

Status quantize_absmax(const QuantizeAbsmaxArgs& args, void* stream) {
  const LaunchConfig one_block{dim3(1), kSumThreads, 0, stream};
  const Status status = launch("absmax_mean_kernel", absmax_mean_kernel, one_block, args.absmax,
                               args.numel, args.nested_offset);
  if (!status.ok() || args.numel == 0) return status;
  const BlockPlan plan = block_plan(args.numel, kNestedBlockSize);
  const LaunchConfig config{quantize_grid(plan), kQuantizeThreads, 0, stream};
  return launch("quantize_absmax_kernel", quantize_absmax_kernel, config, args.absmax, plan,
                args.nested_offset, args.codes, args.nested_absmax);
}

}  // namespace qkern::cuda
