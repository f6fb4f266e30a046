// The Python module qkern._C: integers in (see arguments.h), kernels called, errors out. The GIL is
// released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "arguments.h"
#include "cuda.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

using namespace qkern::binding;

void quantize_4bit(Pointer x, int x_dtype, Size numel, int format, Pointer codebook,
                   Size block_size, Pointer packed, Pointer absmax, int num_threads) {
  launch("quantize_4bit", qkern::cpu::quantize_4bit,
         quantize_4bit_args(x, x_dtype, numel, format, codebook, block_size, packed, absmax),
         num_threads);
}

void dequantize_4bit(Pointer packed, Pointer absmax, Pointer nested_absmax, Pointer nested_offset,
                     int format, Pointer codebook, Size block_size, Size numel, Pointer out,
                     int out_dtype, int num_threads) {
  launch("dequantize_4bit", qkern::cpu::dequantize_4bit,
         dequantize_4bit_args(packed, absmax, nested_absmax, nested_offset, format, codebook,
                              block_size, numel, out, out_dtype),
         num_threads);
}

void quantize_8bit(Pointer x, int x_dtype, Size numel, Pointer map, Size block_size, Pointer codes,
                   Pointer absmax, int num_threads) {
  launch("quantize_8bit", qkern::cpu::quantize_8bit,
         quantize_8bit_args(x, x_dtype, numel, map, block_size, codes, absmax), num_threads);
}

void dequantize_8bit(Pointer codes, Pointer absmax, Pointer map, Size block_size, Size numel,
                     Pointer out, int out_dtype, int num_threads) {
  launch("dequantize_8bit", qkern::cpu::dequantize_8bit,
         dequantize_8bit_args(codes, absmax, map, block_size, numel, out, out_dtype), num_threads);
}

void quantize_absmax(Pointer absmax, Size numel, Pointer codes, Pointer nested_absmax,
                     Pointer nested_offset, int num_threads) {
  launch("quantize_absmax", qkern::cpu::quantize_absmax,
         quantize_absmax_args(absmax, numel, codes, nested_absmax, nested_offset), num_threads);
}

void linear_4bit(Pointer x, int dtype, Size m, Size x_row_stride, Pointer packed, Pointer absmax,
                 Pointer nested_absmax, Pointer nested_offset, int format, Pointer codebook,
                 Size block_size, Size rows, Size cols, Pointer bias, Pointer y,
                 bool batch_invariant, int num_threads) {
  launch("linear_4bit", qkern::cpu::linear_4bit,
         linear_4bit_args(x, dtype, m, x_row_stride, packed, absmax, nested_absmax, nested_offset,
                          format, codebook, block_size, rows, cols, bias, y, batch_invariant),
         num_threads);
}

void linear_4bit_dx(Pointer dy, int dtype, Size m, Size dy_row_stride, Pointer packed,
                    Pointer absmax, Pointer nested_absmax, Pointer nested_offset, int format,
                    Pointer codebook, Size block_size, Size rows, Size cols, Pointer dx,
                    bool batch_invariant, int num_threads) {
  launch("linear_4bit_dx", qkern::cpu::linear_4bit_dx,
         linear_4bit_args(dy, dtype, m, dy_row_stride, packed, absmax, nested_absmax, nested_offset,
                          format, codebook, block_size, rows, cols, 0, dx, batch_invariant),
         num_threads);
}

void adamw_step(const std::vector<std::array<Size, 11>>& tensors, std::optional<std::uint64_t> seed,
                int num_threads) {
  const std::vector<qkern::AdamWTensor> read = adamw_tensors(tensors);
  launch("adamw_step", qkern::cpu::adamw_step, adamw_args(read, seed), num_threads);
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
#ifdef QKERN_HAVE_CUDA
  info["cuda"] = QKERN_CUDA_BUILD;
#else
  info["cuda"] = py::none();
#endif
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
  m.def("adamw_step", adamw_step);
  bind_tensors(m);
#ifdef QKERN_HAVE_CUDA
  bind_cuda(m);
#endif
  m.def("isa", isa, "Name of the instruction set in force.");
  m.def("available_isas", available_isas, "Names of those that this processor runs, worst first.");
  m.def(
      "multiplies_bfloat16", qkern::cpu::multiplies_bfloat16,
      "Whether the processor multiplies bfloat16, by instructions not wider than those in force.");
  m.def("set_isa", set_isa, "Force an instruction set; '' goes back to the default.");
  m.def("build_info", build_info);
  m.def(
      "scratch_bytes",
      [](bool reset) { return static_cast<Size>(qkern::cpu::scratch_peak(reset)); },
      "Most scratch that one thread has asked for since the last reset, in bytes.");
}
