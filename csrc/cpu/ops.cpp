// The CPU launchers: prepare tables, split the work among threads, call the active kernels.
#include "qkern/ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"
#include "qkern/codes.h"
#include "subnormals.h"

namespace qkern::cpu {
namespace {

constexpr const char* kUnknownIsa =
    "QKERN_CPU_ISA: names no instruction set that this build and processor have";

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

float midpoint(float a, float b) { return (a + b) * 0.5f; }

// One threshold at most in each bin makes one comparison enough. Bins are a monotone function of
// the key, so a key in a lower bin is below the threshold and one in a higher bin above it.
void add_bins(EncodeTable* table) {
  constexpr int kLast = EncodeTable::kBins - 1;
  // Keys lie in [-1, 1], or [0, 1] for magnitudes; the margin keeps 1 + rounding in the last bin.
  const float margin = 0.999f;
  table->bin_scale = (table->sign_magnitude ? 32.0f : 16.0f) * margin;
  table->bin_offset = table->sign_magnitude ? 0.0f : 16.0f;
  int next = 0;
  for (int bin = 0; bin < EncodeTable::kBins; ++bin) {
    table->bin_threshold[bin] = std::numeric_limits<float>::infinity();
    table->bin_rank[bin] = next;
    int inside = 0;
    while (next < table->num_thresholds) {
      // The very arithmetic of the kernels: one fused multiply-add, truncated.
      const float position = std::fma(table->thresholds[next], table->bin_scale, table->bin_offset);
      const int owner = std::clamp(static_cast<int>(position), 0, kLast);
      if (owner != bin) break;
      if (++inside > 1) return;
      table->bin_threshold[bin] = table->thresholds[next++];
    }
  }
  if (next < table->num_thresholds) return;
  table->lookup = table->sign_magnitude                             ? Lookup::kBinsMagnitude
                  : std::is_sorted(table->codes, table->codes + 16) ? Lookup::kBins
                                                                    : Lookup::kBinsPermuted;
}

EncodeTable make_encode_table(const Codebook& codes) {
  EncodeTable table{};
  if (codes.format == kFormatFp4) {
    table.sign_magnitude = true;
    table.num_thresholds = 7;
    std::copy_n(kFp4MagnitudeMidpoints, 7, table.thresholds);
    std::copy_n(kFp4MagnitudeCodes, 8, table.codes);
    add_bins(&table);
    return table;
  }
  const float* values = codes.format == kFormatNf4 ? kNf4Codes : codes.codebook;
  int order[16];
  for (int i = 0; i < 16; ++i) order[i] = i;
  std::stable_sort(order, order + 16, [&](int a, int b) { return values[a] < values[b]; });
  for (int i = 0; i < 16; ++i) table.codes[i] = static_cast<std::uint8_t>(order[i]);
  bool within_range = true;
  for (int i = 0; i < 15; ++i) {
    table.thresholds[i] = midpoint(values[order[i]], values[order[i + 1]]);
    within_range = within_range && std::abs(table.thresholds[i]) <= 1.0f;
  }
  if (within_range) add_bins(&table);
  return table;
}

// The kernels for `index` = a dtype, or an error where QKERN_CPU_ISA names nothing usable.
template <typename Fn>
Status with_kernels(const Fn& fn) {
  [[maybe_unused]] const KeepSubnormals keep;
  const KernelTable* table = active_kernels();
  return table == nullptr ? Status::error(kUnknownIsa) : fn(*table);
}

// Splits blocks among threads in runs of about kRunElements, so that a short tensor stays on the
// calling thread.
template <typename Fn>
Status for_blocks(std::int64_t numel, std::int64_t block_size, int num_threads, const Fn& fn) {
  constexpr std::int64_t kRunElements = std::int64_t{1} << 16;
  const std::int64_t blocks = ceil_div(numel, block_size);
  const std::int64_t grain = std::max<std::int64_t>(1, kRunElements / block_size);
  WorkQueue queue(blocks, grain);
  auto body = [&] {
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) fn(BlockRange{numel, block_size, begin, end});
  };
  const std::int64_t runs = ceil_div(blocks, grain);
  parallel(static_cast<int>(std::min<std::int64_t>(runs, num_threads)), body);
  return Status::success();
}

int index_of(DType dtype) { return static_cast<int>(dtype); }

// Thresholds between neighbours of an ascending map, rounded down: t > threshold is then exactly
// t > midpoint for every float t.
void map_thresholds(const float* map, float* thresholds) {
  for (int i = 0; i < 255; ++i) {
    const double exact = (static_cast<double>(map[i]) + static_cast<double>(map[i + 1])) / 2;
    float rounded = static_cast<float>(exact);
    if (static_cast<double>(rounded) > exact) {
      rounded = std::nextafter(rounded, -std::numeric_limits<float>::infinity());
    }
    thresholds[i] = rounded;
  }
}

// Every bucket of the dynamic maps' thresholds has one at most; a test compares all codes.
BucketTable make_bucket_table(const float* map, const float* thresholds, int shift) {
  BucketTable table{};
  table.map = map;
  table.thresholds = thresholds;
  table.shift = shift;
  table.first = BucketTable::kFirstExponent << (23 - shift);
  const std::uint32_t low_bits = (1u << shift) - 1u;
  for (std::uint32_t i = 0; i < 2u * BucketTable::kBuckets; ++i) {
    const bool negative = i >= BucketTable::kBuckets;
    const std::uint32_t bucket = table.first + (negative ? i - BucketTable::kBuckets : i);
    const std::uint32_t smallest_bits = bucket << shift | (negative ? 0x80000000u : 0u);
    float smallest;
    std::memcpy(&smallest, &smallest_bits, sizeof(smallest));
    std::uint32_t code = 0;
    std::uint32_t last = low_bits;
    for (int k = 0; k < 255; ++k) {
      std::uint32_t bits;
      std::memcpy(&bits, &thresholds[k], sizeof(bits));
      if (thresholds[k] < smallest) ++code;
      if (bits >> shift == smallest_bits >> shift) {
        // t > threshold: for t < 0, only below its magnitude.
        const std::uint32_t low = bits & low_bits;
        if (!negative) last = low;
        if (negative && low > 0) last = low - 1;
      }
    }
    // The first bucket of a sign also stands for all below: none of them has the next code.
    if (bucket == table.first) last = low_bits;
    table.words[i] = code << 24 | last;
  }
  return table;
}

// Of the signed and the unsigned map, at the largest shifts that leave one threshold a bucket.
const BucketTable* bucket_tables() {
  static const BucketTable tables[2] = {
      make_bucket_table(kDynamicMapSigned, kDynamicThresholdsSigned, 17),
      make_bucket_table(kDynamicMapUnsigned, kDynamicThresholdsUnsigned, 16)};
  return tables;
}

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

double exact_sum(const float* values, std::int64_t n, int num_threads) {
  constexpr std::int64_t kRun = std::int64_t{1} << 16;
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
  parallel(static_cast<int>(std::min<std::int64_t>(ceil_div(n, kRun), num_threads)), body);
  return total.round();
}

}  // namespace

Status quantize_4bit(const Quantize4bitArgs& args, int num_threads) {
  const EncodeTable table = make_encode_table(args.codes);
  return with_kernels([&](const KernelTable& kernels) {
    return for_blocks(args.numel, args.block_size, num_threads, [&](BlockRange range) {
      kernels.quantize_4bit[index_of(args.x_dtype)](args.x, range, table, args.packed, args.absmax);
    });
  });
}

Status dequantize_4bit(const Dequantize4bitArgs& args, int num_threads) {
  return with_kernels([&](const KernelTable& kernels) {
    const std::int64_t numel = args.weight.rows * args.weight.cols;
    return for_blocks(numel, args.weight.block_size, num_threads, [&](BlockRange range) {
      kernels.dequantize_4bit[index_of(args.out_dtype)](args.weight, range, args.out);
    });
  });
}

Status quantize_8bit(const Quantize8bitArgs& args, int num_threads) {
  float thresholds[255];
  map_thresholds(args.map, thresholds);
  return with_kernels([&](const KernelTable& kernels) {
    return for_blocks(args.numel, args.block_size, num_threads, [&](BlockRange range) {
      kernels.quantize_8bit[index_of(args.x_dtype)](args.x, range, thresholds, args.codes,
                                                    args.absmax);
    });
  });
}

Status dequantize_8bit(const Dequantize8bitArgs& args, int num_threads) {
  return with_kernels([&](const KernelTable& kernels) {
    return for_blocks(args.numel, args.block_size, num_threads, [&](BlockRange range) {
      kernels.dequantize_8bit[index_of(args.out_dtype)](args.codes, args.absmax, args.map, range,
                                                        args.out);
    });
  });
}

Status quantize_absmax(const QuantizeAbsmaxArgs& args, int num_threads) {
  [[maybe_unused]] const KeepSubnormals keep;
  const double mean = args.numel == 0 ? 0.0
                                      : exact_sum(args.absmax, args.numel, num_threads) /
                                            static_cast<double>(args.numel);
  const float offset = static_cast<float>(mean);
  args.nested_offset[0] = offset;
  return with_kernels([&](const KernelTable& kernels) {
    return for_blocks(args.numel, kNestedBlockSize, num_threads, [&](BlockRange range) {
      // One block at a time, so that the differences stay on the stack.
      for (std::int64_t b = range.begin; b < range.end; ++b) {
        const std::int64_t start = b * kNestedBlockSize;
        const std::int64_t n = std::min<std::int64_t>(kNestedBlockSize, args.numel - start);
        float differences[kNestedBlockSize];
        for (std::int64_t i = 0; i < n; ++i) differences[i] = args.absmax[start + i] - offset;
        kernels.quantize_8bit[index_of(DType::kFloat32)](
            differences, BlockRange{n, kNestedBlockSize, 0, 1}, kDynamicThresholdsSigned,
            args.codes + start, args.nested_absmax + b);
      }
    });
  });
}

Status adamw_step(const AdamWArgs& args, int num_threads) {
  // Runs of one tensor each, long enough that handing them out costs nothing.
  constexpr std::int64_t kRun = std::int64_t{1} << 15;
  static_assert(kRun % kStateBlockSize == 0, "runs are whole blocks");
  struct Run {
    const AdamWTensor* tensor;
    std::int64_t begin;
  };
  std::vector<Run> runs;
  for (std::int64_t i = 0; i < args.count; ++i) {
    for (std::int64_t begin = 0; begin < args.tensors[i].numel; begin += kRun) {
      runs.push_back({args.tensors + i, begin});
    }
  }
  const BucketTable* tables = bucket_tables();
  return with_kernels([&](const KernelTable& kernels) {
    const std::int64_t count = static_cast<std::int64_t>(runs.size());
    WorkQueue queue(count, 1);
    auto body = [&] {
      std::int64_t i, stop;
      while (queue.next(&i, &stop)) {
        const AdamWTensor& tensor = *runs[static_cast<std::size_t>(i)].tensor;
        const std::int64_t begin = runs[static_cast<std::size_t>(i)].begin;
        kernels.adamw_step[index_of(tensor.dtype)](args, tables, tensor, begin,
                                                   std::min(begin + kRun, tensor.numel));
      }
    };
    parallel(static_cast<int>(std::min<std::int64_t>(count, num_threads)), body);
    return Status::success();
  });
}

Status linear_4bit(const Linear4bitArgs& args, int num_threads) {
  if (args.m == 0 || args.weight.rows == 0) return Status::success();
  return with_kernels([&](const KernelTable& kernels) {
    return kernels.linear_4bit[index_of(args.dtype)](args, num_threads);
  });
}

Status linear_4bit_dx(const Linear4bitArgs& args, int num_threads) {
  if (args.m == 0 || args.weight.cols == 0) return Status::success();
  return with_kernels([&](const KernelTable& kernels) {
    return kernels.linear_4bit_dx[index_of(args.dtype)](args, num_threads);
  });
}

}  // namespace qkern::cpu
