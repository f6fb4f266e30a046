#include "exact_sum.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "parallel.h"

namespace qkern::cpu {
namespace {

// A sum of floats without rounding: each is an integer below 2^24 times a power of two, so 64-bit
// integers, one for each exponent, hold up to 2^39 of them in any order.
class ExactSum {
 public:
  void add(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t exponent = (bits >> 23) & 0xffu;
    if (exponent == 0xffu) {
      finite_ = false;
      return;
    }
    const std::int64_t mantissa =
        static_cast<std::int64_t>((bits & 0x7fffffu) | (exponent != 0 ? 0x800000u : 0u));
    const std::uint32_t bin = exponent != 0 ? exponent - 1 : 0;
    bins_[bin] += (bits >> 31) != 0 ? -mantissa : mantissa;
  }

  void merge(const ExactSum& other) {
    finite_ = finite_ && other.finite_;
    for (int i = 0; i < kBins; ++i) bins_[i] += other.bins_[i];
  }

  // The sum rounded once to double; NaN where any term was not finite.
  double round() const {
    if (!finite_) return std::numeric_limits<double>::quiet_NaN();
    // Two's complement in 32-bit limbs, in units of 2^-149, the least float.
    std::uint32_t limbs[kLimbs] = {};
    for (int i = 0; i < kBins; ++i) add_shifted(limbs, bins_[i], i);
    const bool negative = (limbs[kLimbs - 1] >> 31) != 0;
    if (negative) negate(limbs);
    const double magnitude = round_limbs(limbs);
    return negative ? -magnitude : magnitude;
  }

 private:
  static constexpr int kBins = 254;
  static constexpr int kLimbs = (kBins + 64) / 32 + 2;

  static void add_shifted(std::uint32_t* limbs, std::int64_t value, int shift) {
    const std::uint32_t fill = value < 0 ? 0xffffffffu : 0u;
    const std::uint64_t low = static_cast<std::uint64_t>(value) << (shift % 32);
    const std::uint64_t high = shift % 32 == 0
                                   ? static_cast<std::uint64_t>(fill)
                                   : static_cast<std::uint64_t>(value >> (64 - shift % 32));
    const std::uint32_t parts[3] = {static_cast<std::uint32_t>(low),
                                    static_cast<std::uint32_t>(low >> 32),
                                    static_cast<std::uint32_t>(high)};
    std::uint64_t carry = 0;
    for (int i = shift / 32, part = 0; i < kLimbs; ++i, ++part) {
      carry += static_cast<std::uint64_t>(limbs[i]) + (part < 3 ? parts[part] : fill);
      limbs[i] = static_cast<std::uint32_t>(carry);
      carry >>= 32;
    }
  }

  static void negate(std::uint32_t* limbs) {
    std::uint64_t carry = 1;
    for (int i = 0; i < kLimbs; ++i) {
      carry += static_cast<std::uint32_t>(~limbs[i]);
      limbs[i] = static_cast<std::uint32_t>(carry);
      carry >>= 32;
    }
  }

  static int bit(const std::uint32_t* limbs, int i) {
    return static_cast<int>((limbs[i / 32] >> (i % 32)) & 1u);
  }

  static double round_limbs(const std::uint32_t* limbs) {
    int top = kLimbs * 32 - 1;
    while (top >= 0 && bit(limbs, top) == 0) --top;
    if (top < 0) return 0.0;
    constexpr int kMantissa = 53;
    const int lowest = std::max(0, top - kMantissa + 1);
    std::uint64_t mantissa = 0;
    for (int i = top; i >= lowest; --i) {
      mantissa = mantissa << 1 | static_cast<std::uint64_t>(bit(limbs, i));
    }
    if (lowest > 0 && bit(limbs, lowest - 1) != 0) {
      bool sticky = (mantissa & 1u) != 0;
      for (int i = 0; i < lowest - 1 && !sticky; ++i) sticky = bit(limbs, i) != 0;
      mantissa += sticky ? 1 : 0;
    }
    return std::ldexp(static_cast<double>(mantissa), lowest - 149);
  }

  bool finite_ = true;
  std::int64_t bins_[kBins] = {};
};

}  // namespace

double exact_sum(const float* values, std::int64_t n, int num_threads) {
  constexpr std::int64_t kRun = std::int64_t{1} << 16;
  const std::int64_t runs = (n + kRun - 1) / kRun;
  WorkQueue queue(n, kRun);
  ExactSum total;
  std::mutex mutex;
  auto body = [&] {
    ExactSum mine;
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) {
      for (std::int64_t i = begin; i < end; ++i) mine.add(values[i]);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    total.merge(mine);
  };
  parallel(static_cast<int>(std::min<std::int64_t>(runs, num_threads)), n, body);
  return total.round();
}

}  // namespace qkern::cpu
