// The Python module _cuda_emulated: the functions of qkern._C, with the CUDA launchers behind them,
// run by the emulator on CPU memory. The last argument, a number of threads, has no meaning here.
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "arguments.h"
#include "cuda_emulator/scheduler.h"

namespace py = pybind11;

namespace {

using namespace qkern::binding;
namespace cuda = qkern::cuda;
namespace emulator = qkern::cuda::emulator;

template <typename Args>
void launch(const char* op, qkern::Status (*fn)(const Args&, void*), const Args& args) {
  qkern::Status status;
  {
    py::gil_scoped_release release;
    status = fn(args, nullptr);
  }
  raise_on_error(op, status);
}

// With a workspace of exactly the size that the op asks for, filled with poison.
void launch_linear(const char* op, qkern::Status (*fn)(const qkern::Linear4bitArgs&, void*),
                   qkern::Status (*workspace)(const qkern::Linear4bitArgs&, std::int64_t*),
                   qkern::Linear4bitArgs args) {
  std::int64_t bytes = 0;
  raise_on_error(op, workspace(args, &bytes));
  const auto size = static_cast<std::size_t>(bytes);
  const std::unique_ptr<unsigned char[]> memory(size == 0 ? nullptr : new unsigned char[size]);
  if (memory != nullptr) std::memset(memory.get(), emulator::kPoisonByte, size);
  args.workspace = reinterpret_cast<float*>(memory.get());
  launch(op, fn, args);
}

void quantize_4bit(Pointer x, int x_dtype, Size numel, int format, Pointer codebook,
                   Size block_size, Pointer packed, Pointer absmax, int) {
  launch("quantize_4bit", cuda::quantize_4bit,
         quantize_4bit_args(x, x_dtype, numel, format, codebook, block_size, packed, absmax));
}

void dequantize_4bit(Pointer packed, Pointer absmax, Pointer nested_absmax, Pointer nested_offset,
                     int format, Pointer codebook, Size block_size, Size numel, Pointer out,
                     int out_dtype, int) {
  launch("dequantize_4bit", cuda::dequantize_4bit,
         dequantize_4bit_args(packed, absmax, nested_absmax, nested_offset, format, codebook,
                              block_size, numel, out, out_dtype));
}

void quantize_8bit(Pointer x, int x_dtype, Size numel, Pointer map, Size block_size, Pointer codes,
                   Pointer absmax, int) {
  launch("quantize_8bit", cuda::quantize_8bit,
         quantize_8bit_args(x, x_dtype, numel, map, block_size, codes, absmax));
}

void dequantize_8bit(Pointer codes, Pointer absmax, Pointer map, Size block_size, Size numel,
                     Pointer out, int out_dtype, int) {
  launch("dequantize_8bit", cuda::dequantize_8bit,
         dequantize_8bit_args(codes, absmax, map, block_size, numel, out, out_dtype));
}

void quantize_absmax(Pointer absmax, Size numel, Pointer codes, Pointer nested_absmax,
                     Pointer nested_offset, int) {
  launch("quantize_absmax", cuda::quantize_absmax,
         quantize_absmax_args(absmax, numel, codes, nested_absmax, nested_offset));
}

void linear_4bit(Pointer x, int dtype, Size m, Size x_row_stride, Pointer packed, Pointer absmax,
                 Pointer nested_absmax, Pointer nested_offset, int format, Pointer codebook,
                 Size block_size, Size rows, Size cols, Pointer bias, Pointer y,
                 bool batch_invariant, int) {
  launch_linear(
      "linear_4bit", cuda::linear_4bit, cuda::linear_4bit_workspace,
      linear_4bit_args(x, dtype, m, x_row_stride, packed, absmax, nested_absmax, nested_offset,
                       format, codebook, block_size, rows, cols, bias, y, batch_invariant));
}

void linear_4bit_dx(Pointer dy, int dtype, Size m, Size dy_row_stride, Pointer packed,
                    Pointer absmax, Pointer nested_absmax, Pointer nested_offset, int format,
                    Pointer codebook, Size block_size, Size rows, Size cols, Pointer dx,
                    bool batch_invariant, int) {
  launch_linear(
      "linear_4bit_dx", cuda::linear_4bit_dx, cuda::linear_4bit_dx_workspace,
      linear_4bit_args(dy, dtype, m, dy_row_stride, packed, absmax, nested_absmax, nested_offset,
                       format, codebook, block_size, rows, cols, 0, dx, batch_invariant));
}

void set_schedule(const std::string& order, std::uint64_t seed, bool late_copies, int capability) {
  emulator::Settings settings;
  if (order == "reverse") {
    settings.order = emulator::Order::kReverse;
  } else if (order == "random") {
    settings.order = emulator::Order::kRandom;
  } else if (order != "forward") {
    throw py::value_error("order: got " + order + "; takes forward, reverse or random");
  }
  settings.seed = seed;
  settings.cp_async = late_copies ? emulator::CpAsync::kLate : emulator::CpAsync::kEarly;
  settings.capability = capability;
  emulator::settings() = settings;
}

}  // namespace

PYBIND11_MODULE(_cuda_emulated, m) {
  m.doc() = "qkern's CUDA kernels on a CPU; see README.md.";
  m.def("quantize_4bit", quantize_4bit);
  m.def("dequantize_4bit", dequantize_4bit);
  m.def("quantize_8bit", quantize_8bit);
  m.def("dequantize_8bit", dequantize_8bit);
  m.def("quantize_absmax", quantize_absmax);
  m.def("linear_4bit", linear_4bit);
  m.def("linear_4bit_dx", linear_4bit_dx);
  m.def(
      "set_schedule", set_schedule,
      "order (forward, reverse, random), seed, late_copies (of cp.async), capability (75, 80...)");
}
