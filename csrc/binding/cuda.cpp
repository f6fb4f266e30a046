// The CUDA functions of qkern._C. Each starts its kernels on a stream of the current device.
#include "cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "arguments.h"

namespace qkern::binding {
namespace {

CudaPath path_from(int path) {
  require(path >= 0 && path <= 2, "path: takes 0 (vector), 1 (mma) or 2 (tiled)");
  return static_cast<CudaPath>(path);
}

template <typename Fn, typename Args>
void start(const char* op, const Fn& fn, const Args& args, Pointer stream) {
  Status status;
  {
    pybind11::gil_scoped_release release;
    status = fn(args, at<void>(stream));
  }
  raise_on_error(op, status);
}

void adamw_step(const std::vector<std::array<Size, 11>>& tensors, std::optional<std::uint64_t> seed,
                Pointer stream) {
  const std::vector<AdamWTensor> read = adamw_tensors(tensors);
  start("adamw_step", cuda::adamw_step, adamw_args(read, seed), stream);
}

void quantize_4bit(Pointer x, int x_dtype, Size numel, int format, Pointer codebook,
                   Size block_size, Pointer packed, Pointer absmax, Pointer stream) {
  start("quantize_4bit", cuda::quantize_4bit,
        quantize_4bit_args(x, x_dtype, numel, format, codebook, block_size, packed, absmax),
        stream);
}

void dequantize_4bit(Pointer packed, Pointer absmax, Pointer nested_absmax, Pointer nested_offset,
                     int format, Pointer codebook, Size block_size, Size numel, Pointer out,
                     int out_dtype, Pointer stream) {
  start("dequantize_4bit", cuda::dequantize_4bit,
        dequantize_4bit_args(packed, absmax, nested_absmax, nested_offset, format, codebook,
                             block_size, numel, out, out_dtype),
        stream);
}

// The rectangle of `rows` x `columns` at (row, column) of a weight with rows of `cols` elements.
void dequantize_4bit_region(Pointer packed, Pointer absmax, Pointer nested_absmax,
                            Pointer nested_offset, int format, Pointer codebook, Size block_size,
                            Size cols, Size row, Size column, Size rows, Size columns, Pointer out,
                            int out_dtype, Pointer stream) {
  require(row >= 0 && column >= 0 && rows >= 0 && columns > 0 && column + columns <= cols,
          "region: takes rows and columns within the weight");
  const Region region{row * cols + column, columns, cols - columns};
  start(
      "dequantize_4bit_region",
      [&region](const Dequantize4bitArgs& args, void* on) {
        return cuda::dequantize_4bit_region(args, region, on);
      },
      dequantize_4bit_args(packed, absmax, nested_absmax, nested_offset, format, codebook,
                           block_size, rows * columns, out, out_dtype),
      stream);
}

void quantize_8bit(Pointer x, int x_dtype, Size numel, Pointer map, Size block_size, Pointer codes,
                   Pointer absmax, Pointer stream) {
  start("quantize_8bit", cuda::quantize_8bit,
        quantize_8bit_args(x, x_dtype, numel, map, block_size, codes, absmax), stream);
}

void dequantize_8bit(Pointer codes, Pointer absmax, Pointer map, Size block_size, Size numel,
                     Pointer out, int out_dtype, Pointer stream) {
  start("dequantize_8bit", cuda::dequantize_8bit,
        dequantize_8bit_args(codes, absmax, map, block_size, numel, out, out_dtype), stream);
}

void quantize_absmax(Pointer absmax, Size numel, Pointer codes, Pointer nested_absmax,
                     Pointer nested_offset, Pointer stream) {
  start("quantize_absmax", cuda::quantize_absmax,
        quantize_absmax_args(absmax, numel, codes, nested_absmax, nested_offset), stream);
}

void linear_4bit(Pointer x, int dtype, Size m, Size x_row_stride, Pointer packed, Pointer absmax,
                 Pointer nested_absmax, Pointer nested_offset, int format, Pointer codebook,
                 Size block_size, Size rows, Size cols, Pointer bias, Pointer y,
                 bool batch_invariant, int path, Pointer workspace, Pointer stream) {
  Linear4bitArgs args =
      linear_4bit_args(x, dtype, m, x_row_stride, packed, absmax, nested_absmax, nested_offset,
                       format, codebook, block_size, rows, cols, bias, y, batch_invariant);
  args.path = path_from(path);
  args.workspace = at<float>(workspace);
  start("linear_4bit", cuda::linear_4bit, args, stream);
}

void linear_4bit_dx(Pointer dy, int dtype, Size m, Size dy_row_stride, Pointer packed,
                    Pointer absmax, Pointer nested_absmax, Pointer nested_offset, int format,
                    Pointer codebook, Size block_size, Size rows, Size cols, Pointer dx,
                    bool batch_invariant, int path, Pointer workspace, Pointer stream) {
  Linear4bitArgs args =
      linear_4bit_args(dy, dtype, m, dy_row_stride, packed, absmax, nested_absmax, nested_offset,
                       format, codebook, block_size, rows, cols, 0, dx, batch_invariant);
  args.path = path_from(path);
  args.workspace = at<float>(workspace);
  start("linear_4bit_dx", cuda::linear_4bit_dx, args, stream);
}

// Bytes of workspace that linear_4bit (or linear_4bit_dx, whose x is dy) takes on a path.
Size linear_workspace(bool input_gradient, int dtype, Size m, Size rows, Size cols,
                      bool batch_invariant, int path) {
  Linear4bitArgs args;
  args.dtype = dtype_from(dtype);
  args.m = m;
  args.weight.rows = rows;
  args.weight.cols = cols;
  args.batch_invariant = batch_invariant;
  args.path = path_from(path);
  Size bytes = 0;
  raise_on_error("linear_4bit", input_gradient ? cuda::linear_4bit_dx_workspace(args, &bytes)
                                               : cuda::linear_4bit_workspace(args, &bytes));
  return bytes;
}

// (compute capability, processors, bytes of L2) of the current device.
pybind11::tuple device_limits() {
  cuda::DeviceLimits limits;
  raise_on_error("device_limits", cuda::device_limits(&limits));
  return pybind11::make_tuple(limits.capability, limits.processors, limits.l2_bytes);
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
  m.def("cuda_adamw_step", adamw_step);
  m.def("cuda_quantize_4bit", quantize_4bit);
  m.def("cuda_dequantize_4bit", dequantize_4bit);
  m.def("cuda_dequantize_4bit_region", dequantize_4bit_region);
  m.def("cuda_quantize_8bit", quantize_8bit);
  m.def("cuda_dequantize_8bit", dequantize_8bit);
  m.def("cuda_quantize_absmax", quantize_absmax);
  m.def("cuda_linear_4bit", linear_4bit);
  m.def("cuda_linear_4bit_dx", linear_4bit_dx);
  m.def("cuda_linear_workspace", linear_workspace);
  m.def("cuda_device_limits", device_limits);
}

}  // namespace qkern::binding
