// How the integers that Python passes become the kernels' arguments, whatever backend runs them.
// Pointers arrive as integers (0 = absent) that qkern/backends/_args.py took from checked tensors;
// sizes and strides are in elements. (tensors.cpp reads tensors itself.)
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "qkern/codes.h"
#include "qkern/ops.h"

namespace qkern::binding {

using Pointer = std::uintptr_t;
using Size = std::int64_t;

template <typename T>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

inline void require(bool condition, const char* what) {
  if (!condition) throw pybind11::value_error(what);
}

inline void raise_on_error(const char* op, const Status& status) {
  if (status.ok()) return;
  std::string what = std::string(op) + ": " + status.message;
  if (status.detail != nullptr) what += std::string(": ") + status.detail;
  throw std::runtime_error(what);
}

// Runs a CPU kernel without the GIL.
template <typename Args>
void launch(const char* op, Status (*fn)(const Args&, int), const Args& args, int num_threads) {
  require(num_threads >= 1, "num_threads: takes 1 and above");
  Status status;
  {
    pybind11::gil_scoped_release release;
    status = fn(args, num_threads);
  }
  raise_on_error(op, status);
}

inline DType dtype_from(int number) {
  require(number >= 0 && number <= 2, "dtype: takes 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<DType>(number);
}

inline Codebook codebook_from(int format, Pointer codebook) {
  require(format >= kFormatNf4 && format <= kFormatCustom,
          "format_id: takes 0 (nf4), 1 (fp4) or 2 (custom)");
  require(format != kFormatCustom || codebook != 0, "codebook: absent for format custom");
  return {format, at<const float>(codebook)};
}

inline void check_block_size(Size block_size) {
  require(block_size >= kMinBlockSize && block_size <= kMaxBlockSize &&
              (block_size & (block_size - 1)) == 0,
          "block_size: takes a power of two from 32 to 4096");
}

inline Weight4bit weight_from(Pointer packed, Pointer absmax, Pointer nested_absmax,
                              Pointer nested_offset, int format, Pointer codebook, Size block_size,
                              Size rows, Size cols) {
  check_block_size(block_size);
  require(rows >= 0 && cols >= 0, "shape: takes sizes of 0 and above");
  require((nested_absmax == 0) == (nested_offset == 0),
          "nested_absmax and nested_offset: take both or neither");
  Weight4bit weight;
  weight.packed = at<const std::uint8_t>(packed);
  weight.absmax = at<const void>(absmax);
  weight.nested_absmax = at<const float>(nested_absmax);
  weight.nested_offset = at<const float>(nested_offset);
  weight.codes = codebook_from(format, codebook);
  weight.block_size = block_size;
  weight.rows = rows;
  weight.cols = cols;
  return weight;
}

inline Quantize4bitArgs quantize_4bit_args(Pointer x, int x_dtype, Size numel, int format,
                                           Pointer codebook, Size block_size, Pointer packed,
                                           Pointer absmax) {
  check_block_size(block_size);
  Quantize4bitArgs args;
  args.x = at<const void>(x);
  args.x_dtype = dtype_from(x_dtype);
  args.numel = numel;
  args.codes = codebook_from(format, codebook);
  args.block_size = block_size;
  args.packed = at<std::uint8_t>(packed);
  args.absmax = at<float>(absmax);
  return args;
}

inline Dequantize4bitArgs dequantize_4bit_args(Pointer packed, Pointer absmax,
                                               Pointer nested_absmax, Pointer nested_offset,
                                               int format, Pointer codebook, Size block_size,
                                               Size numel, Pointer out, int out_dtype) {
  Dequantize4bitArgs args;
  args.weight = weight_from(packed, absmax, nested_absmax, nested_offset, format, codebook,
                            block_size, 1, numel);
  args.out = at<void>(out);
  args.out_dtype = dtype_from(out_dtype);
  return args;
}

inline Quantize8bitArgs quantize_8bit_args(Pointer x, int x_dtype, Size numel, Pointer map,
                                           Size block_size, Pointer codes, Pointer absmax) {
  check_block_size(block_size);
  Quantize8bitArgs args;
  args.x = at<const void>(x);
  args.x_dtype = dtype_from(x_dtype);
  args.numel = numel;
  args.map = at<const float>(map);
  args.block_size = block_size;
  args.codes = at<std::uint8_t>(codes);
  args.absmax = at<float>(absmax);
  return args;
}

inline Dequantize8bitArgs dequantize_8bit_args(Pointer codes, Pointer absmax, Pointer map,
                                               Size block_size, Size numel, Pointer out,
                                               int out_dtype) {
  check_block_size(block_size);
  Dequantize8bitArgs args;
  args.codes = at<const std::uint8_t>(codes);
  args.absmax = at<const float>(absmax);
  args.map = at<const float>(map);
  args.block_size = block_size;
  args.numel = numel;
  args.out = at<void>(out);
  args.out_dtype = dtype_from(out_dtype);
  return args;
}

inline QuantizeAbsmaxArgs quantize_absmax_args(Pointer absmax, Size numel, Pointer codes,
                                               Pointer nested_absmax, Pointer nested_offset) {
  QuantizeAbsmaxArgs args;
  args.absmax = at<const float>(absmax);
  args.numel = numel;
  args.codes = at<std::uint8_t>(codes);
  args.nested_absmax = at<float>(nested_absmax);
  args.nested_offset = at<float>(nested_offset);
  return args;
}

// Of linear_4bit (x, y, a bias or none) and of linear_4bit_dx (dy, dx, no bias).
inline Linear4bitArgs linear_4bit_args(Pointer x, int dtype, Size m, Size x_row_stride,
                                       Pointer packed, Pointer absmax, Pointer nested_absmax,
                                       Pointer nested_offset, int format, Pointer codebook,
                                       Size block_size, Size rows, Size cols, Pointer bias,
                                       Pointer y, bool batch_invariant) {
  Linear4bitArgs args;
  args.x = at<const void>(x);
  args.dtype = dtype_from(dtype);
  args.m = m;
  args.x_row_stride = x_row_stride;
  args.weight = weight_from(packed, absmax, nested_absmax, nested_offset, format, codebook,
                            block_size, rows, cols);
  args.bias = at<const void>(bias);
  args.y = at<void>(y);
  args.batch_invariant = batch_invariant;
  return args;
}

// Each: param, grad, exp_avg, exp_avg_sq, their absmax (0 for float moments), dtype, numel, index,
// first.
inline std::vector<AdamWTensor> adamw_tensors(const std::vector<std::array<Size, 11>>& tensors) {
  std::vector<AdamWTensor> read;
  read.reserve(tensors.size());
  for (const auto& from : tensors) {
    const auto pointer = [&](std::size_t i) { return static_cast<Pointer>(from[i]); };
    AdamWTensor tensor;
    tensor.param = at<void>(pointer(0));
    tensor.grad = at<const void>(pointer(1));
    tensor.exp_avg = at<void>(pointer(2));
    tensor.exp_avg_sq = at<void>(pointer(3));
    tensor.exp_avg_absmax = at<float>(pointer(4));
    tensor.exp_avg_sq_absmax = at<float>(pointer(5));
    tensor.factors = at<const AdamWFactors>(pointer(6));
    tensor.dtype = dtype_from(static_cast<int>(from[7]));
    tensor.numel = from[8];
    tensor.index = from[9];
    tensor.first = from[10];
    require((from[4] == 0) == (from[5] == 0), "absmax: takes those of both moments or neither");
    require(from[8] >= 0 && from[10] >= 0 && from[10] % kStateBlockSize == 0,
            "first: takes a multiple of the block size");
    read.push_back(tensor);
  }
  return read;
}

inline AdamWArgs adamw_args(const std::vector<AdamWTensor>& tensors,
                            std::optional<std::uint64_t> seed) {
  AdamWArgs args;
  args.tensors = tensors.data();
  args.count = static_cast<Size>(tensors.size());
  args.stochastic_rounding = seed.has_value();
  args.seed = seed.value_or(0);
  return args;
}

}  // namespace qkern::binding
