// The matmuls of several experts, each by its own rows: one after the other.
#include <cstdint>
#include <cstring>
#include <utility>

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

// Calls body(rows) for each expert until one fails; `done` becomes the rows of all that were
// called.
template <typename Body>
Status for_experts(const GroupOffsets& groups, std::int64_t* done, const Body& body) {
  *done = 0;
  for (std::int64_t expert = 0; expert < groups.experts; ++expert) {
    const std::int64_t end = groups.wide ? static_cast<const std::int64_t*>(groups.offsets)[expert]
                                         : static_cast<const std::int32_t*>(groups.offsets)[expert];
    const Status status = body(end - *done);
    if (!status.ok()) return status;
    *done = end;
  }
  return Status::success();
}

void fill_zeros(void* rows, std::int64_t count, std::int64_t bytes) {
  std::memset(rows, 0, static_cast<std::size_t>(count * bytes));
}

void* behind(void* pointer, std::int64_t bytes) { return static_cast<char*>(pointer) + bytes; }

using Matmul = Status (*)(const Linear4bitArgs& args, int num_threads);

Status grouped(const GroupedLinear4bitArgs& args, std::int64_t columns, Matmul matmul,
               int num_threads) {
  const std::int64_t y_bytes = columns * size_of(args.all.dtype);
  Linear4bitArgs one = args.all;
  std::int64_t done = 0;
  const Status status = for_experts(args.groups, &done, [&](std::int64_t rows) {
    Status found = Status::success();
    one.m = rows;
    if (rows > 0) {
      found = matmul(one, num_threads);
      advance(one.x, rows * one.x_row_stride * size_of(one.dtype));
      advance(one.added.left, rows * one.added.left_row_stride);
      one.y = behind(one.y, rows * y_bytes);
    }
    advance_weight(one, args.right_stride);
    return found;
  });
  if (status.ok()) fill_zeros(one.y, args.all.m - done, y_bytes);
  return status;
}

}  // namespace

Status grouped_linear_4bit(const GroupedLinear4bitArgs& args, int num_threads) {
  return grouped(args, args.all.weight.rows, linear_4bit, num_threads);
}

Status grouped_linear_4bit_dx(const GroupedLinear4bitArgs& args, int num_threads) {
  return grouped(args, args.all.weight.cols, linear_4bit_dx, num_threads);
}

Status grouped_matmul_into(const GroupedMatmulIntoArgs& args, int num_threads) {
  MatmulIntoArgs one = args.all;
  const std::int64_t out_bytes = one.n * size_of(one.out_dtype);
  std::int64_t done = 0;
  if (!args.own_b) {
    one.m = args.all.k;
    std::swap(one.a_row_stride, one.a_col_stride);
  }
  const Status status = for_experts(args.groups, &done, [&](std::int64_t rows) {
    Status found = Status::success();
    (args.own_b ? one.m : one.k) = rows;
    const std::int64_t out_rows = args.own_b ? rows : args.all.k;
    if (rows > 0) {
      found = matmul_into(one, num_threads);
    } else if (!one.accumulate) {
      fill_zeros(one.out, out_rows, out_bytes);
    }
    one.out = behind(one.out, out_rows * out_bytes);
    advance(one.a, rows * args.all.a_row_stride * size_of(one.a_dtype));
    advance(one.b, (args.own_b ? args.b_stride : rows * one.b_row_stride) * size_of(one.b_dtype));
    return found;
  });
  if (status.ok() && args.own_b && !one.accumulate) {
    fill_zeros(one.out, args.all.m - done, out_bytes);
  }
  return status;
}

}  // namespace qkern::cpu
