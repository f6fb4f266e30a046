// The CPU launchers: prepare tables, split the work among threads, call the active kernels.
#include "qkern/ops.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "encode_tables.h"
#include "exact_sum.h"
#include "kernel_table.h"
#include "pages.h"
#include "parallel.h"
#include "qkern/codes.h"
#include "subnormals.h"

namespace qkern::cpu {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Splits blocks among threads in runs of about kRunElements, so that a short tensor stays on the
// calling thread.
template <typename Fn>
Status for_blocks(std::int64_t numel, std::int64_t block_size, int num_threads, const Fn& fn) {
  constexpr std::int64_t kRunElements = std::int64_t{1} << 16;
  const std::int64_t blocks = ceil_div(numel, block_size);
  const std::int64_t grain = std::max<std::int64_t>(1, kRunElements / block_size);
  const std::int64_t runs = ceil_div(blocks, grain);
  const int threads = static_cast<int>(std::min<std::int64_t>(runs, num_threads));
  PartedQueue queue(blocks, grain, threads);
  auto body = [&] {
    PartedQueue::Reader reader(queue);
    std::int64_t begin, end;
    while (reader.next(&begin, &end)) fn(BlockRange{numel, block_size, begin, end});
  };
  // One thread takes about a nanosecond for an element.
  parallel(threads, numel, body);
  return Status::success();
}

int index_of(DType dtype) { return static_cast<int>(dtype); }

// Makes memory ready for a result, and says whether that goes past the caches, straight to memory,
// whose lines a usual store would read first. That pays for one too large to wait in a cache for
// its reader. But memory that was just allocated has no pages yet: the system clears each when it
// is first written, and so has it in a cache already. There large pages are asked for, as numpy
// does for its arrays.
bool prepare_result(void* out, std::int64_t size) {
  constexpr std::int64_t kLarge = std::int64_t{4} << 20, kPastCaches = std::int64_t{16} << 20;
  if (size < kLarge) return false;
  const std::size_t bytes = static_cast<std::size_t>(size);
  if (!has_pages(out, bytes)) {
    ask_for_large_pages(out, bytes);
    return false;
  }
  return size > kPastCaches && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
}

// The smallest code that restores to no negative scale, or the last. Restored values ascend with
// the code, since rounding keeps an order.
unsigned least_code(float nested_absmax, float nested_offset) {
  const auto is_negative = [&](unsigned code) {
    return kDynamicMapSigned[code] * nested_absmax + nested_offset < 0.0f;
  };
  unsigned least = 0;
  if (!is_negative(0)) return least;
  for (unsigned step = 128; step > 0; step /= 2) least += is_negative(least + step - 1) ? step : 0;
  return least;
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
    const std::int64_t bytes = numel * (args.out_dtype == DType::kFloat32 ? 4 : 2);
    const bool past_caches = prepare_result(args.out, bytes);
    return for_blocks(numel, args.weight.block_size, num_threads, [&](BlockRange range) {
      kernels.dequantize_4bit[index_of(args.out_dtype)](args.weight, range, args.out, past_caches);
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
        const unsigned least = least_code(args.nested_absmax[b], offset);
        if (least == 0) continue;
        for (std::int64_t i = start; i < start + n; ++i) {
          args.codes[i] = std::max(args.codes[i], static_cast<std::uint8_t>(least));
        }
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
    parallel(static_cast<int>(std::min<std::int64_t>(count, num_threads)), count * kRun, body);
    return Status::success();
  });
}

std::int64_t linear_nanoseconds(const Linear4bitArgs& args) {
  // Decoding a weight costs like four rows' products.
  constexpr std::int64_t kDecode = 4, kPerNanosecond = 24;
  return args.weight.rows * args.weight.cols / kPerNanosecond * (args.m + kDecode);
}

std::int64_t matmul_nanoseconds(const MatmulIntoArgs& args) {
  constexpr std::int64_t kPerNanosecond = 20;
  return args.m * args.n * args.k / kPerNanosecond;
}

Status linear_4bit(const Linear4bitArgs& args, int num_threads) {
  if (args.m == 0 || args.weight.rows == 0) return Status::success();
  return with_kernels([&](const KernelTable& kernels) {
    return kernels.linear_4bit[index_of(args.dtype)](args, num_threads);
  });
}

// Whether a weight's rows are whole blocks, and its codes far from the ends of float32's range.
static bool takes_8_bits(const Weight4bit& weight) {
  if (weight.cols % weight.block_size != 0) return false;
  if (weight.codes.format != kFormatCustom) return true;
  float largest = 0.0f;
  for (int i = 0; i < 16; ++i) largest = std::max(largest, std::abs(weight.codes.codebook[i]));
  return largest > 0x1p-10f && largest < 0x1p10f;
}

Status linear_4bit_int8(const Linear4bitArgs& args, int num_threads) {
  if (!takes_8_bits(args.weight) || (args.m > kInt8Rows && !args.batch_invariant)) {
    return linear_4bit(args, num_threads);
  }
  if (args.m == 0 || args.weight.rows == 0) return Status::success();
  const std::int64_t bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  return with_kernels([&](const KernelTable& kernels) {
    const int dtype = index_of(args.dtype);
    // A row that does not fit is computed as usual, alone: it is no matter to the others.
    for (std::int64_t row = 0; row < args.m;) {
      Linear4bitArgs some = args;
      some.m = args.m - row;
      some.x = static_cast<const char*>(args.x) + row * args.x_row_stride * bytes;
      some.y = static_cast<char*>(args.y) + row * args.weight.rows * bytes;
      const std::int64_t fit = kernels.rows_in_8_bits[dtype](some);
      some.m = std::max<std::int64_t>(fit, 1);
      const auto kernel = fit > 0 ? kernels.linear_4bit_int8[dtype] : kernels.linear_4bit[dtype];
      if (const Status status = kernel(some, num_threads); !status.ok()) return status;
      row += some.m;
    }
    return Status::success();
  });
}

Status linear_4bit_dx(const Linear4bitArgs& args, int num_threads) {
  if (args.m == 0 || args.weight.cols == 0) return Status::success();
  return with_kernels([&](const KernelTable& kernels) {
    return kernels.linear_4bit_dx[index_of(args.dtype)](args, num_threads);
  });
}

Status matmul_into(const MatmulIntoArgs& args, int num_threads) {
  if (args.m == 0 || args.n == 0) return Status::success();
  return with_kernels(
      [&](const KernelTable& kernels) { return kernels.matmul_into(args, num_threads); });
}

}  // namespace qkern::cpu
