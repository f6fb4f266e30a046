// The Python module qkern._C: integers in, kernels called, errors out. Pointers arrive as integers
// (0 = absent) that qkern/backends/_args.py took from checked tensors; sizes and strides are in
// elements. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "qkern/codes.h"
#include "qkern/ops.h"

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;
using Size = std::int64_t;

template <typename T>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

void require(bool condition, const char* what) {
  if (!condition) throw py::value_error(what);
}

void raise_on_error(const char* op, qkern::Status status) {
  if (!status.ok()) throw std::runtime_error(std::string(op) + ": " + status.message);
}

qkern::DType dtype_from(int number) {
  require(number >= 0 && number <= 2, "dtype: takes 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<qkern::DType>(number);
}

qkern::Codebook codebook_from(int format, Pointer codebook) {
  require(format >= qkern::kFormatNf4 && format <= qkern::kFormatCustom,
          "format_id: takes 0 (nf4), 1 (fp4) or 2 (custom)");
  require(format != qkern::kFormatCustom || codebook != 0, "codebook: absent for format custom");
  return {format, at<const float>(codebook)};
}

void check_block_size(Size block_size) {
  require(block_size >= qkern::kMinBlockSize && block_size <= qkern::kMaxBlockSize &&
              (block_size & (block_size - 1)) == 0,
          "block_size: takes a power of two from 32 to 4096");
}

qkern::Weight4bit weight_from(Pointer packed, Pointer absmax, Pointer nested_absmax,
                              Pointer nested_offset, int format, Pointer codebook, Size block_size,
                              Size rows, Size cols) {
  check_block_size(block_size);
  require(rows >= 0 && cols >= 0, "shape: takes sizes of 0 and above");
  require((nested_absmax == 0) == (nested_offset == 0),
          "nested_absmax and nested_offset: take both or neither");
  qkern::Weight4bit weight;
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

template <typename Args>
void launch(const char* op, qkern::Status (*fn)(const Args&, int), const Args& args,
            int num_threads) {
  require(num_threads >= 1, "num_threads: takes 1 and above");
  qkern::Status status;
  {
    py::gil_scoped_release release;
    status = fn(args, num_threads);
  }
  raise_on_error(op, status);
}

void quantize_4bit(Pointer x, int x_dtype, Size numel, int format, Pointer codebook,
                   Size block_size, Pointer packed, Pointer absmax, int num_threads) {
  check_block_size(block_size);
  qkern::Quantize4bitArgs args;
  args.x = at<const void>(x);
  args.x_dtype = dtype_from(x_dtype);
  args.numel = numel;
  args.codes = codebook_from(format, codebook);
  args.block_size = block_size;
  args.packed = at<std::uint8_t>(packed);
  args.absmax = at<float>(absmax);
  launch("quantize_4bit", qkern::cpu::quantize_4bit, args, num_threads);
}

void dequantize_4bit(Pointer packed, Pointer absmax, Pointer nested_absmax, Pointer nested_offset,
                     int format, Pointer codebook, Size block_size, Size numel, Pointer out,
                     int out_dtype, int num_threads) {
  qkern::Dequantize4bitArgs args;
  args.weight = weight_from(packed, absmax, nested_absmax, nested_offset, format, codebook,
                            block_size, 1, numel);
  args.out = at<void>(out);
  args.out_dtype = dtype_from(out_dtype);
  launch("dequantize_4bit", qkern::cpu::dequantize_4bit, args, num_threads);
}

void quantize_8bit(Pointer x, int x_dtype, Size numel, Pointer map, Size block_size, Pointer codes,
                   Pointer absmax, int num_threads) {
  check_block_size(block_size);
  qkern::Quantize8bitArgs args;
  args.x = at<const void>(x);
  args.x_dtype = dtype_from(x_dtype);
  args.numel = numel;
  args.map = at<const float>(map);
  args.block_size = block_size;
  args.codes = at<std::uint8_t>(codes);
  args.absmax = at<float>(absmax);
  launch("quantize_8bit", qkern::cpu::quantize_8bit, args, num_threads);
}

void dequantize_8bit(Pointer codes, Pointer absmax, Pointer map, Size block_size, Size numel,
                     Pointer out, int out_dtype, int num_threads) {
  check_block_size(block_size);
  qkern::Dequantize8bitArgs args;
  args.codes = at<const std::uint8_t>(codes);
  args.absmax = at<const float>(absmax);
  args.map = at<const float>(map);
  args.block_size = block_size;
  args.numel = numel;
  args.out = at<void>(out);
  args.out_dtype = dtype_from(out_dtype);
  launch("dequantize_8bit", qkern::cpu::dequantize_8bit, args, num_threads);
}

void quantize_absmax(Pointer absmax, Size numel, Pointer codes, Pointer nested_absmax,
                     Pointer nested_offset, int num_threads) {
  qkern::QuantizeAbsmaxArgs args;
  args.absmax = at<const float>(absmax);
  args.numel = numel;
  args.codes = at<std::uint8_t>(codes);
  args.nested_absmax = at<float>(nested_absmax);
  args.nested_offset = at<float>(nested_offset);
  launch("quantize_absmax", qkern::cpu::quantize_absmax, args, num_threads);
}

void linear_4bit(Pointer x, int dtype, Size m, Size x_row_stride, Pointer packed, Pointer absmax,
                 Pointer nested_absmax, Pointer nested_offset, int format, Pointer codebook,
                 Size block_size, Size rows, Size cols, Pointer bias, Pointer y,
                 bool batch_invariant, int num_threads) {
  qkern::Linear4bitArgs args;
  args.x = at<const void>(x);
  args.dtype = dtype_from(dtype);
  args.m = m;
  args.x_row_stride = x_row_stride;
  args.weight = weight_from(packed, absmax, nested_absmax, nested_offset, format, codebook,
                            block_size, rows, cols);
  args.bias = at<const void>(bias);
  args.y = at<void>(y);
  args.batch_invariant = batch_invariant;
  launch("linear_4bit", qkern::cpu::linear_4bit, args, num_threads);
}

void linear_4bit_dx(Pointer dy, int dtype, Size m, Size dy_row_stride, Pointer packed,
                    Pointer absmax, Pointer nested_absmax, Pointer nested_offset, int format,
                    Pointer codebook, Size block_size, Size rows, Size cols, Pointer dx,
                    bool batch_invariant, int num_threads) {
  qkern::Linear4bitArgs args;
  args.x = at<const void>(dy);
  args.dtype = dtype_from(dtype);
  args.m = m;
  args.x_row_stride = dy_row_stride;
  args.weight = weight_from(packed, absmax, nested_absmax, nested_offset, format, codebook,
                            block_size, rows, cols);
  args.y = at<void>(dx);
  args.batch_invariant = batch_invariant;
  launch("linear_4bit_dx", qkern::cpu::linear_4bit_dx, args, num_threads);
}

py::list available_isas() {
  const char* names[qkern::cpu::kMaxIsas];
  const int count = qkern::cpu::available_isas(names);
  py::list list;
  for (int i = 0; i < count; ++i) list.append(names[i]);
  return list;
}

std::string isa() {
  const qkern::cpu::KernelTable* table = qkern::cpu::active_kernels();
  if (table == nullptr) {
    throw py::value_error(
        "QKERN_CPU_ISA: names no instruction set that this build and processor have");
  }
  return table->name;
}

void set_isa(const std::string& name) {
  if (!qkern::cpu::set_isa(name.c_str()).ok()) {
    throw py::value_error("isa: got '" + name + "'; takes one of " +
                          std::string(py::str(available_isas())));
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = QKERN_VERSION;
  info["compiler"] = QKERN_COMPILER;
  info["cxx_flags"] = QKERN_CXX_FLAGS;
  info["threads"] = qkern::cpu::parallel_runtime();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "qkern's native kernels, on pointers and sizes. Use the functions of qkern instead.";
  m.attr("version") = QKERN_VERSION;
  m.def("quantize_4bit", quantize_4bit);
  m.def("dequantize_4bit", dequantize_4bit);
  m.def("quantize_8bit", quantize_8bit);
  m.def("dequantize_8bit", dequantize_8bit);
  m.def("quantize_absmax", quantize_absmax);
  m.def("linear_4bit", linear_4bit);
  m.def("linear_4bit_dx", linear_4bit_dx);
  m.def("isa", isa, "Name of the instruction set in force.");
  m.def("available_isas", available_isas, "Names of those that this processor runs, worst first.");
  m.def("set_isa", set_isa, "Force an instruction set; '' goes back to the default.");
  m.def("build_info", build_info);
  m.def(
      "scratch_bytes",
      [](bool reset) { return static_cast<Size>(qkern::cpu::scratch_peak(reset)); },
      "Most scratch that one thread has asked for since the last reset, in bytes.");
}
