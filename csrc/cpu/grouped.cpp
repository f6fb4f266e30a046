// The matmuls of several experts, each by its own rows: one after the other, but no thread waits
// for the others between them.
#include <cstdint>
#include <cstring>
#include <utility>

#include "dispatch.h"
#include "parallel.h"
#include "qkern/experts.h"
#include "qkern/ops.h"

namespace qkern::cpu {
namespace {

std::int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <typename T>
void advance(const T*& pointer, std::int64_t elements) {
  if (pointer != nullptr) pointer += elements;
}

void advance(const void*& pointer, std::int64_t bytes) {
  if (pointer != nullptr) pointer = static_cast<const char*>(pointer) + bytes;
}

// The next weight of the same shape, its bias and its right factor.
void advance_weight(Linear4bitArgs& args, std::int64_t right_stride) {
  Weight4bit& weight = args.weight;
  const ExpertStride stride = expert_stride(weight);
  advance(weight.packed, stride.packed);
  advance(weight.absmax, stride.absmax);
  advance(weight.nested_absmax, stride.nested_absmax);
  advance(weight.nested_offset, 1);
  advance(args.bias, weight.rows * size_of(args.dtype));
  advance(args.added.right, right_stride);
}

// Calls body(rows) for each expert until one fails.
template <typename Body>
Status for_experts(const GroupOffsets& groups, const Body& body) {
  std::int64_t begin = 0;
  for (std::int64_t expert = 0; expert < groups.experts; ++expert) {
    const std::int64_t end = end_of(groups, expert);
    const Status status = body(end - begin);
    if (!status.ok()) return status;
    begin = end;
  }
  return Status::success();
}

// What several matmuls are together.
struct Total {
  std::int64_t matmuls = 0;
  std::int64_t nanoseconds = 0;  // about, of one thread
};

// Has each thread call all_experts(), which returns a status, each time with the same matmuls.
template <typename Fn>
Status on_threads(int num_threads, const Total& total, const Fn& all_experts) {
  const char* failure = nullptr;
  auto body = [&] {
    const Status status = all_experts();
    if (!status.ok()) __atomic_store_n(&failure, status.message, __ATOMIC_RELAXED);
  };
  parallel_sequence(num_threads, total.nanoseconds, total.matmuls, body);
  return Status{failure};
}

void fill_zeros(void* rows, std::int64_t count, std::int64_t bytes) {
  std::memset(rows, 0, static_cast<std::size_t>(count * bytes));
}

void* behind(void* pointer, std::int64_t bytes) { return static_cast<char*>(pointer) + bytes; }

Status grouped(const GroupedLinear4bitArgs& args, std::int64_t columns,
               const KernelTable::LinearFn* kernels, int num_threads) {
  const std::int64_t y_bytes = columns * size_of(args.all.dtype);
  const KernelTable::LinearFn matmul = kernels[static_cast<int>(args.all.dtype)];
  Linear4bitArgs one = args.all;
  Total total;
  std::int64_t done = 0;
  (void)for_experts(args.groups, [&](std::int64_t rows) {
    one.m = rows;
    done += rows;
    if (rows > 0) ++total.matmuls, total.nanoseconds += linear_nanoseconds(one);
    return Status::success();
  });
  fill_zeros(behind(args.all.y, done * y_bytes), args.all.m - done, y_bytes);
  return on_threads(num_threads, total, [&] {
    Linear4bitArgs expert = args.all;
    return for_experts(args.groups, [&](std::int64_t rows) {
      Status found = Status::success();
      expert.m = rows;
      if (rows > 0) {
        found = matmul(expert, num_threads);
        advance(expert.x, rows * expert.x_row_stride * size_of(expert.dtype));
        advance(expert.added.left, rows * expert.added.left_row_stride);
        expert.y = behind(expert.y, rows * y_bytes);
      }
      advance_weight(expert, args.right_stride);
      return found;
    });
  });
}

}  // namespace

Status grouped_linear_4bit(const GroupedLinear4bitArgs& args, int num_threads) {
  if (args.all.m == 0 || args.all.weight.rows == 0) return Status::success();
  return with_kernels([&](const KernelTable& kernels) {
    return grouped(args, args.all.weight.rows, kernels.linear_4bit, num_threads);
  });
}

Status grouped_linear_4bit_dx(const GroupedLinear4bitArgs& args, int num_threads) {
  if (args.all.m == 0 || args.all.weight.cols == 0) return Status::success();
  return with_kernels([&](const KernelTable& kernels) {
    return grouped(args, args.all.weight.cols, kernels.linear_4bit_dx, num_threads);
  });
}

Status grouped_matmul_into(const GroupedMatmulIntoArgs& args, int num_threads) {
  if (args.all.n == 0) return Status::success();
  MatmulIntoArgs first = args.all;
  if (!args.own_b) {
    first.m = args.all.k;
    std::swap(first.a_row_stride, first.a_col_stride);
  }
  const std::int64_t out_bytes = first.n * size_of(first.out_dtype);
  // The rows of out that an expert with so many rows of a has.
  const auto out_rows = [&](std::int64_t rows) { return args.own_b ? rows : first.m; };
  const auto set_rows = [&](MatmulIntoArgs& one, std::int64_t rows) {
    (args.own_b ? one.m : one.k) = rows;
  };
  MatmulIntoArgs one = first;
  Total total;
  std::int64_t done = 0;
  (void)for_experts(args.groups, [&](std::int64_t rows) {
    set_rows(one, rows);
    done += rows;
    if (rows > 0) {
      ++total.matmuls, total.nanoseconds += matmul_nanoseconds(one);
    } else if (!one.accumulate) {
      fill_zeros(one.out, out_rows(rows), out_bytes);
    }
    one.out = behind(one.out, out_rows(rows) * out_bytes);
    return Status::success();
  });
  if (args.own_b && !one.accumulate) fill_zeros(one.out, args.all.m - done, out_bytes);
  return with_kernels([&](const KernelTable& kernels) {
    return on_threads(num_threads, total, [&] {
      MatmulIntoArgs expert = first;
      return for_experts(args.groups, [&](std::int64_t rows) {
        Status found = Status::success();
        set_rows(expert, rows);
        if (rows > 0) found = kernels.matmul_into(expert, num_threads);
        expert.out = behind(expert.out, out_rows(rows) * out_bytes);
        advance(expert.a, rows * args.all.a_row_stride * size_of(expert.a_dtype));
        const std::int64_t b_step = args.own_b ? args.b_stride : rows * expert.b_row_stride;
        advance(expert.b, b_step * size_of(expert.b_dtype));
        return found;
      });
    });
  });
}

}  // namespace qkern::cpu
