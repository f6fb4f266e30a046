// matmul_into on tensors themselves, as tensors.cpp has the matmuls of 4-bit weights.
#include <climits>

#include "plain_tensor.h"
#include "python.h"
#include "tensors.h"

namespace qkern::binding {
namespace {

// A matrix as a kernel takes it, and where its memory begins and ends.
struct Matrix {
  PlainTensor tensor;
  DType dtype = DType::kFloat32;
  const char* begin = nullptr;
  const char* end = nullptr;

  bool read(PyObject* object) {
    if (!tensor.read(object) || tensor.ndim() != 2 || !tensor.floating(&dtype) ||
        tensor.numel() <= 0 || is_negated(object)) {
      return false;
    }
    const Size last =
        (tensor.size(0) - 1) * tensor.stride(0) + (tensor.size(1) - 1) * tensor.stride(1) + 1;
    begin = tensor.data<const char>();
    end = begin + last * (dtype == DType::kFloat32 ? 4 : 2);
    return true;
  }
  bool is_apart_from(const Matrix& other) const { return end <= other.begin || other.end <= begin; }
};

bool read_matmul_into(PyObject* const* given, MatmulIntoArgs* args, Size* num_threads) {
  Matrix out, a, b;
  if (!out.read(given[0]) || !a.read(given[1]) || !b.read(given[2]) || !PyFloat_Check(given[3]) ||
      !PyBool_Check(given[4]) || !read_size(given[5], num_threads) || *num_threads < 1 ||
      *num_threads > INT_MAX) {
    return false;
  }
  args->m = out.tensor.size(0);
  args->n = out.tensor.size(1);
  args->k = a.tensor.size(1);
  args->out_row_stride = out.tensor.stride(0);
  if (a.tensor.size(0) != args->m || b.tensor.size(0) != args->k || b.tensor.size(1) != args->n ||
      (args->n > 1 && out.tensor.stride(1) != 1) ||
      (args->m > 1 && args->out_row_stride < args->n) || !out.is_apart_from(a) ||
      !out.is_apart_from(b)) {
    return false;
  }
  args->out = out.tensor.data<void>();
  args->out_dtype = out.dtype;
  args->a = a.tensor.data<const void>();
  args->a_dtype = a.dtype;
  args->a_row_stride = a.tensor.stride(0);
  args->a_col_stride = a.tensor.stride(1);
  args->b = b.tensor.data<const void>();
  args->b_dtype = b.dtype;
  args->b_row_stride = b.tensor.stride(0);
  args->b_col_stride = b.tensor.stride(1);
  args->alpha = static_cast<float>(PyFloat_AS_DOUBLE(given[3]));
  args->accumulate = given[4] == Py_True;
  return true;
}

}  // namespace

// (out, a, b, alpha, accumulate, num_threads)
PyObject* matmul_into_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError, "matmul_into: takes 6 arguments");
    return nullptr;
  }
  return with_python_errors("matmul_into", [&]() -> PyObject* {
    MatmulIntoArgs args;
    Size num_threads = 0;
    if (library.read == nullptr || !read_matmul_into(given, &args, &num_threads)) Py_RETURN_NONE;
    run_without_gil("matmul_into",
                    [&] { return cpu::matmul_into(args, static_cast<int>(num_threads)); });
    Py_RETURN_TRUE;
  });
}

}  // namespace qkern::binding
