// matmul_into, of one factor and by experts, on tensors themselves, as tensors.cpp has the matmuls
// of 4-bit weights.
#include <climits>

#include "plain_tensor.h"
#include "python.h"
#include "qkern/experts.h"
#include "read_matmul.h"
#include "tensors.h"

namespace qkern::binding {
namespace {

// A matrix as a kernel takes it, or one for each expert, and where its memory begins and ends.
struct Matrix {
  PlainTensor tensor;
  DType dtype = DType::kFloat32;
  const char* begin = nullptr;
  const char* end = nullptr;

  bool read(PyObject* object) {
    const bool found = tensor.read(object) && (tensor.ndim() == 2 || tensor.ndim() == 3) &&
                       tensor.floating(&dtype) && tensor.numel() > 0 && !is_negated(object);
    if (!found) return false;
    Size last = 1;
    for (int i = 0; i < tensor.ndim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    begin = tensor.data<const char>();
    end = begin + last * (dtype == DType::kFloat32 ? 4 : 2);
    return true;
  }
  bool is_apart_from(const Matrix& other) const { return end <= other.begin || other.end <= begin; }

  bool is_of(Size rows, Size columns) const {
    return tensor.ndim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
  }
  bool is_of(Size experts, Size rows, Size columns) const {
    return tensor.ndim() == 3 && tensor.size(0) == experts && tensor.size(1) == rows &&
           tensor.size(2) == columns;
  }
  Size columns() const { return tensor.size(tensor.ndim() - 1); }
  Size row_stride() const { return tensor.stride(tensor.ndim() - 2); }
  Size col_stride() const { return tensor.stride(tensor.ndim() - 1); }
};

// The arguments of a product, and its matrices.
struct Product {
  Matrix out, a, b;
  MatmulIntoArgs args;

  // All but whether the sizes fit and how `out` lies. `rest` is alpha and accumulate.
  bool read(PyObject* const* matrices, PyObject* const* rest, PyObject* threads,
            Size* num_threads) {
    const bool found = out.read(matrices[0]) && a.read(matrices[1]) && b.read(matrices[2]) &&
                       a.tensor.ndim() == 2 && PyFloat_Check(rest[0]) && PyBool_Check(rest[1]) &&
                       read_size(threads, num_threads) && *num_threads >= 1 &&
                       *num_threads <= INT_MAX && out.is_apart_from(a) && out.is_apart_from(b);
    if (!found) return false;
    args.m = a.tensor.size(0);
    args.n = out.columns();
    args.k = a.columns();
    args.out = out.tensor.data<void>();
    args.out_dtype = out.dtype;
    args.out_row_stride = out.row_stride();
    args.a = a.tensor.data<const void>();
    args.a_dtype = a.dtype;
    args.a_row_stride = a.row_stride();
    args.a_col_stride = a.col_stride();
    args.b = b.tensor.data<const void>();
    args.b_dtype = b.dtype;
    args.b_row_stride = b.row_stride();
    args.b_col_stride = b.col_stride();
    args.alpha = static_cast<float>(PyFloat_AS_DOUBLE(rest[0]));
    args.accumulate = rest[1] == Py_True;
    return true;
  }
};

bool fits(const Product& product) {
  const MatmulIntoArgs& args = product.args;
  return product.out.is_of(args.m, args.n) && product.b.is_of(args.k, args.n) &&
         (args.n == 1 || product.out.col_stride() == 1) &&
         (args.m == 1 || args.out_row_stride >= args.n);
}

bool fits(Product& product, GroupedMatmulIntoArgs* grouped) {
  MatmulIntoArgs& args = product.args;
  const Size experts = grouped->groups.experts;
  grouped->own_b = product.b.tensor.ndim() == 3;
  if (product.out.tensor.contiguous_numel() < 0 || !ends_ascend(grouped->groups, args.m) ||
      !(grouped->own_b
            ? product.out.is_of(args.m, args.n) && product.b.is_of(experts, args.k, args.n)
            : product.out.is_of(experts, args.k, args.n) && product.b.is_of(args.m, args.n))) {
    return false;
  }
  grouped->b_stride = product.b.tensor.stride(0);
  args.out_row_stride = args.n;  // one row may have any stride
  grouped->all = args;
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
    Product product;
    Size num_threads = 0;
    if (library.read == nullptr || !product.read(given, given + 3, given[5], &num_threads) ||
        !fits(product)) {
      Py_RETURN_NONE;
    }
    run_without_gil("matmul_into",
                    [&] { return cpu::matmul_into(product.args, static_cast<int>(num_threads)); });
    Py_RETURN_TRUE;
  });
}

// (out, a, b, offsets, alpha, accumulate, num_threads)
PyObject* grouped_matmul_into_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count) {
  constexpr const char* kOp = "grouped_matmul_into";
  if (count != 7) {
    PyErr_Format(PyExc_TypeError, "%s: takes 7 arguments", kOp);
    return nullptr;
  }
  return with_python_errors(kOp, [&]() -> PyObject* {
    Product product;
    GroupedMatmulIntoArgs args;
    Size num_threads = 0;
    if (library.read == nullptr || !read_offsets(given[3], dlpack::kCpuDevice, &args.groups) ||
        !product.read(given, given + 4, given[6], &num_threads) || !fits(product, &args)) {
      Py_RETURN_NONE;
    }
    run_without_gil(kOp,
                    [&] { return cpu::grouped_matmul_into(args, static_cast<int>(num_threads)); });
    Py_RETURN_TRUE;
  });
}

}  // namespace qkern::binding
