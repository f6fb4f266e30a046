// The matmuls of several experts on tensors themselves, as tensors.cpp has those of one weight.
#include <utility>

#include "plain_tensor.h"
#include "python.h"
#include "qkern/experts.h"
#include "read_matmul.h"
#include "tensors.h"

namespace qkern::binding {
namespace {

namespace py = pybind11;

using Kernel = Status (*)(const GroupedLinear4bitArgs& args, int num_threads);

PyObject* matmul(const char* op, Kernel kernel, bool input_gradient, PyObject* offsets,
                 const MatmulArguments& from) {
  return with_python_errors(op, [&]() -> PyObject* {
    GroupedLinear4bitArgs args;
    PlainTensor x;
    py::object copy, result;
    Size features = 0, num_threads = 0;
    if (!read_offsets(offsets, dlpack::kCpuDevice, &args.groups) ||
        !read_arguments(from, input_gradient, dlpack::kCpu, &x, &args.all, &features, &num_threads,
                        args.groups.experts) ||
        x.ndim() != 2 || !ends_ascend(args.groups, args.all.m)) {
      Py_RETURN_NONE;
    }
    if (from.left != nullptr) {
      PlainTensor right;
      if (!right.read(from.right)) Py_RETURN_NONE;
      args.right_stride = right.stride(0);
    }
    if ((args.all.x_row_stride < 0 && !read_copied_rows(from.x, x, &copy, &args.all)) ||
        !make_result(from.x, x, features, &result, &args.all)) {
      Py_RETURN_NONE;
    }
    run_without_gil(op, [&] { return kernel(args, static_cast<int>(num_threads)); });
    return result.release().ptr();
  });
}

// A Python exception, null, unless so many arguments came.
bool takes(const char* op, Py_ssize_t count, int number) {
  if (count == number) return true;
  PyErr_Format(PyExc_TypeError, "%s: takes %d arguments", op, number);
  return false;
}

}  // namespace

PyObject* grouped_linear_4bit_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count) {
  constexpr const char* kOp = "grouped_linear_4bit";
  MatmulArguments from;
  PyObject* offsets = nullptr;
  if (!grouped_arguments(kOp, given, count, &from, &offsets)) return nullptr;
  return matmul(kOp, cpu::grouped_linear_4bit, false, offsets, from);
}

PyObject* grouped_linear_4bit_dx_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count) {
  constexpr const char* kOp = "grouped_linear_4bit_dx";
  MatmulArguments from;
  PyObject* offsets = nullptr;
  if (!grouped_dx_arguments(kOp, given, count, &from, &offsets)) return nullptr;
  return matmul(kOp, cpu::grouped_linear_4bit_dx, true, offsets, from);
}

// (x, weight, out_features, offsets, bias, left, right, alpha, batch_invariant, num_threads)
PyObject* grouped_linear_4bit_add_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count) {
  constexpr const char* kOp = "grouped_linear_4bit_add";
  if (!takes(kOp, count, 10)) return nullptr;
  return matmul(kOp, cpu::grouped_linear_4bit, false, given[3],
                {given[0], given[1], given[2], given[4], given[8], given[9], Py_None, given[5],
                 given[6], given[7]});
}

// (dy, weight, in_features, offsets, left, right, alpha, batch_invariant, num_threads)
PyObject* grouped_linear_4bit_dx_add_on_tensors(PyObject*, PyObject* const* given,
                                                Py_ssize_t count) {
  constexpr const char* kOp = "grouped_linear_4bit_dx_add";
  if (!takes(kOp, count, 9)) return nullptr;
  return matmul(kOp, cpu::grouped_linear_4bit_dx, true, given[3],
                {given[0], given[1], given[2], Py_None, given[7], given[8], Py_None, given[4],
                 given[5], given[6]});
}

}  // namespace qkern::binding
