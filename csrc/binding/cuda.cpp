// The CUDA functions of qkern._C. After an op's own arguments comes a stream of the current device,
// on which it starts its kernels.
#include "cuda.h"

#include <vector>

#include "arguments.h"
#include "python.h"

namespace qkern::binding {
namespace {

template <auto kRead, auto kKernel>
Status run_on_stream(Arguments& from) {
  const auto args = kRead(from);
  void* stream = nullptr;
  from.read(Handle{stream});
  from.end();
  return kKernel(args, stream);
}

// A matmul on a path, with the path's workspace.
template <auto kRead>
Linear4bitArgs read_on_path(Arguments& from) {
  Linear4bitArgs args = kRead(from);
  from.read(args.path, Optional{args.workspace});
  return args;
}

// The same by experts, which take no workspace.
template <auto kRead>
GroupedLinear4bitArgs read_grouped_on_path(Arguments& from) {
  GroupedLinear4bitArgs args = kRead(from);
  from.read(args.all.path, Optional{args.all.workspace});
  return args;
}

struct RegionArgs : Dequantize4bitArgs {
  Region region;
};

// The rectangle of `rows` x `columns` at (row, column) of a weight with rows of `cols` elements.
RegionArgs read_region(Arguments& from) {
  RegionArgs args;
  Size cols = 0, row = 0, column = 0, rows = 0, columns = 0;
  from.read(args.weight, cols, row, column, rows, columns, args.out, args.out_dtype);
  require(columns > 0 && column + columns <= cols,
          "region: takes rows and columns within the weight");
  args.region = {row * cols + column, columns, cols - columns};
  args.weight.rows = 1;
  args.weight.cols = rows * columns;
  return args;
}

Status dequantize_region(const RegionArgs& args, void* stream) {
  return cuda::dequantize_4bit_region(args, args.region, stream);
}

constexpr Op kCudaOps[] = {
    {"quantize_4bit", run_on_stream<read_args<Quantize4bitArgs>, cuda::quantize_4bit>},
    {"dequantize_4bit", run_on_stream<read_args<Dequantize4bitArgs>, cuda::dequantize_4bit>},
    {"dequantize_4bit_region", run_on_stream<read_region, dequantize_region>},
    {"quantize_8bit", run_on_stream<read_args<Quantize8bitArgs>, cuda::quantize_8bit>},
    {"dequantize_8bit", run_on_stream<read_args<Dequantize8bitArgs>, cuda::dequantize_8bit>},
    {"quantize_absmax", run_on_stream<read_args<QuantizeAbsmaxArgs>, cuda::quantize_absmax>},
    {"linear_4bit", run_on_stream<read_on_path<read_matmul<true>>, cuda::linear_4bit>},
    {"linear_4bit_dx", run_on_stream<read_on_path<read_matmul<false>>, cuda::linear_4bit_dx>},
    {"grouped_linear_4bit",
     run_on_stream<read_grouped_on_path<read_grouped_matmul<true>>, cuda::grouped_linear_4bit>},
    {"grouped_linear_4bit_dx",
     run_on_stream<read_grouped_on_path<read_grouped_matmul<false>>, cuda::grouped_linear_4bit_dx>},
    {"grouped_matmul_into",
     run_on_stream<read_args<GroupedMatmulIntoArgs>, cuda::grouped_matmul_into>},
    {"adamw_step", run_on_stream<read_adamw_step, cuda::adamw_step>},
};

// What computes linear_4bit (or linear_4bit_dx, whose x is dy) on the current device: a list of
// (path, parts of the contraction, bytes of workspace).
pybind11::list linear_paths(bool input_gradient, int dtype, Size m, Size rows, Size cols,
                            bool batch_invariant, bool aligned) {
  const std::vector<Size> values = {dtype, m, rows, cols};
  Arguments from(values);
  Linear4bitArgs args;
  from.read(args.dtype, args.m, args.weight.rows, args.weight.cols);
  args.batch_invariant = batch_invariant;
  cuda::MatmulPath paths[kCudaPaths];
  int count = 0;
  raise_on_error("linear_4bit",
                 cuda::linear_4bit_paths(args, input_gradient, aligned, paths, &count));
  pybind11::list found;
  for (const cuda::MatmulPath* p = paths; p != paths + count; ++p) {
    found.append(pybind11::make_tuple(static_cast<int>(p->path), p->parts, p->workspace_bytes));
  }
  return found;
}

// (compute capability, processors, bytes of L2) of the current device.
pybind11::tuple device_limits() {
  cuda::DeviceLimits limits;
  raise_on_error("device_limits", cuda::device_limits(&limits));
  return pybind11::make_tuple(limits.capability, limits.processors, limits.l2_bytes);
}

#ifdef QKERN_CUDA_ARCHITECTURES
// (CUDA's version that the driver takes, the runtime's, the architectures that there is code for).
pybind11::tuple versions() {
  cuda::Versions found;
  raise_on_error("versions", cuda::versions(&found));
  return pybind11::make_tuple(found.driver, found.runtime, QKERN_CUDA_ARCHITECTURES);
}
#endif

}  // namespace

void bind_cuda(pybind11::module_& m) {
  add_ops(m, "cuda_", kCudaOps);
  m.def("cuda_linear_paths", linear_paths);
  m.def("cuda_device_limits", device_limits);
  bind_cuda_tensors(m);
#ifdef QKERN_CUDA_ARCHITECTURES
  m.def("cuda_versions", versions);
#endif
}

}  // namespace qkern::binding
