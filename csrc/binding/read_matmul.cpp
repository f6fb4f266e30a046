#include "read_matmul.h"

#include <climits>
#include <cstddef>

#include "python.h"

namespace qkern::binding {
namespace {

namespace py = pybind11;

bool read_codes(PyObject* format, PyObject* codebook, dlpack::Device device, Codebook* codes) {
  if (!PyUnicode_CheckExact(format)) return false;
  if (PyUnicode_CompareWithASCIIString(format, "custom") == 0) {
    PlainTensor values(device);
    if (!values.read_float32_bits(codebook, 16)) return false;
    *codes = {kFormatCustom, values.data<const float>()};
    return true;
  }
  if (PyUnicode_CompareWithASCIIString(format, "nf4") == 0) {
    codes->format = kFormatNf4;
  } else if (PyUnicode_CompareWithASCIIString(format, "fp4") == 0) {
    codes->format = kFormatFp4;
  } else {
    return false;
  }
  return codebook == Py_None;
}

// The items of a 4-bit weight, which is a tuple.
enum WeightItem {
  kPacked,
  kAbsmax,
  kNestedAbsmax,
  kNestedOffset,
  kCodebook,
  kFormat,
  kBlockSize,
  kWeightItems,
};

// x [..., width] as a matrix. Where its memory cannot be read as one, the stride is negative.
bool read_rows(const PlainTensor& x, Linear4bitArgs* args) {
  if (x.ndim() < 1 || x.ndim() > kMostDimensions || !x.floating(&args->dtype)) return false;
  const Size numel = x.numel();
  if (numel <= 0) return false;
  args->m = numel / x.size(x.ndim() - 1);
  args->x_row_stride = x.row_stride();
  args->x = x.data<const void>();
  return true;
}

// alpha left [m, rank] right [rank, features], both float32; of experts, right [E, rank, features].
bool read_added(const MatmulArguments& from, Size m, Size features, Size experts,
                dlpack::Device device, LowRank* added) {
  PlainTensor left(device), right(device);
  const int row = experts == kOneWeight ? 0 : 1;  // the dimension of right's rows
  if (!left.read(from.left) || !right.read(from.right) || !left.is(dlpack::kFloat, 32) ||
      !right.is(dlpack::kFloat, 32) || left.ndim() != 2 || right.ndim() != row + 2 ||
      left.numel() <= 0 || right.numel() <= 0 || left.size(0) != m ||
      right.size(row) != left.size(1) || right.size(row + 1) != features ||
      (experts != kOneWeight && right.size(0) != experts) ||
      (left.size(1) > 1 && left.stride(1) != 1) || !PyFloat_Check(from.alpha) ||
      is_negated(from.left) || is_negated(from.right)) {
    return false;
  }
  added->rank = left.size(1);
  added->left = left.data<const float>();
  added->left_row_stride = left.stride(0);
  added->right = right.data<const float>();
  added->right_row_stride = right.stride(row);
  added->right_col_stride = right.stride(row + 1);
  added->alpha = static_cast<float>(PyFloat_AS_DOUBLE(from.alpha));
  return true;
}

// x.new_empty(*x.shape[:-1], features)
py::object new_result(PyObject* x, const PlainTensor& tensor, Size features) {
  PyObject* arguments[1 + kMostDimensions] = {x};
  const int ndim = tensor.ndim();
  bool complete = true;
  for (int i = 0; i < ndim; ++i) {
    arguments[1 + i] = PyLong_FromLongLong(i + 1 < ndim ? tensor.size(i) : features);
    complete = complete && arguments[1 + i] != nullptr;
  }
  PyObject* result = nullptr;
  if (complete) {
    result = PyObject_VectorcallMethod(library.new_empty, arguments,
                                       static_cast<std::size_t>(1 + ndim), nullptr);
  }
  for (int i = 0; i < ndim; ++i) Py_XDECREF(arguments[1 + i]);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

}  // namespace

bool read_weight(PyObject* object, Size rows, Size cols, dlpack::Device device, Weight4bit* weight,
                 Size experts) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != kWeightItems) return false;
  const auto item = [&](WeightItem i) { return PyTuple_GET_ITEM(object, i); };
  PlainTensor packed(device), absmax(device), nested_absmax(device), nested_offset(device);
  if (!packed.read(item(kPacked)) || !packed.is(dlpack::kUInt, 8)) return false;
  const Size several = experts == kOneWeight ? 1 : experts;
  const Size all_bytes = packed.contiguous_numel(), bytes = all_bytes / several;
  // Divided first, since the product of wrong sizes may not fit in 64 bits.
  if (rows <= 0 || cols <= 0 || bytes <= 0 || rows > 2 * bytes / cols) return false;
  const Size numel = rows * cols;
  Size block_size = 0;
  if (all_bytes != several * (numel / 2 + numel % 2) || !read_size(item(kBlockSize), &block_size) ||
      !is_block_size(block_size)) {
    return false;
  }
  const Size blocks = (numel - 1) / block_size + 1;
  if (item(kNestedAbsmax) == Py_None) {
    if (!absmax.read_float32_bits(item(kAbsmax), several * blocks) ||
        item(kNestedOffset) != Py_None) {
      return false;
    }
  } else {
    const Size groups = (blocks - 1) / kNestedBlockSize + 1;
    if (!absmax.read(item(kAbsmax), dlpack::kUInt, 8, several * blocks) ||
        !nested_absmax.read_float32_bits(item(kNestedAbsmax), several * groups) ||
        !nested_offset.read_float32_bits(item(kNestedOffset), several)) {
      return false;
    }
  }
  weight->packed = packed.data<const std::uint8_t>();
  weight->absmax = absmax.data<const void>();
  weight->nested_absmax = nested_absmax.data<const float>();
  weight->nested_offset = nested_offset.data<const float>();
  weight->block_size = block_size;
  weight->rows = rows;
  weight->cols = cols;
  return read_codes(item(kFormat), item(kCodebook), device, &weight->codes);
}

bool read_copied_rows(PyObject* object, const PlainTensor& x, py::object* copy,
                      Linear4bitArgs* args) {
  *copy = contiguous(object);
  PlainTensor rows(x.device());
  if (!rows.read(copy->ptr()) || !rows.same_dtype(x) || rows.contiguous_numel() != x.numel()) {
    return false;
  }
  args->x = rows.data<const void>();
  args->x_row_stride = x.size(x.ndim() - 1);
  return true;
}

bool read_bias(PyObject* object, const PlainTensor& x, Size features, Linear4bitArgs* args,
               Size experts) {
  if (object == Py_None) return true;
  PlainTensor bias(x.device());
  const int ndim = experts == kOneWeight ? 1 : 2;
  if (!bias.read(object) || !bias.same_dtype(x) || bias.ndim() != ndim ||
      bias.size(ndim - 1) != features || (ndim == 2 && bias.size(0) != experts) ||
      bias.contiguous_numel() <= 0 || is_negated(object)) {
    return false;
  }
  args->bias = bias.data<const void>();
  return true;
}

bool read_arguments(const MatmulArguments& from, bool input_gradient, std::int32_t device_type,
                    PlainTensor* x, Linear4bitArgs* args, Size* features, Size* num_threads,
                    Size experts) {
  if (library.read == nullptr || !x->read_anywhere(from.x) || x->device().type != device_type ||
      !read_rows(*x, args) || !read_size(from.features, features) ||
      !read_size(from.num_threads, num_threads) || *num_threads < 1 || *num_threads > INT_MAX ||
      !PyBool_Check(from.batch_invariant)) {
    return false;
  }
  args->batch_invariant = from.batch_invariant == Py_True;
  const Size width = x->size(x->ndim() - 1);
  Size expected = width;
  if (from.width != Py_None && !read_size(from.width, &expected)) return false;
  const Size rows = input_gradient ? width : *features;
  const Size cols = input_gradient ? *features : width;
  const dlpack::Device device = x->device();
  return width == expected &&
         read_weight(from.weight, rows, cols, device, &args->weight, experts) &&
         read_bias(from.bias, *x, *features, args, experts) && !is_negated(from.x) &&
         (from.left == nullptr ||
          read_added(from, args->m, *features, experts, device, &args->added));
}

bool read_offsets(PyObject* object, dlpack::Device device, GroupOffsets* groups) {
  PlainTensor offsets(device);
  if (!offsets.read(object) || offsets.ndim() != 1) return false;
  groups->wide = offsets.is(dlpack::kInt, 64);
  groups->experts = offsets.contiguous_numel();
  groups->offsets = offsets.data<const void>();
  return groups->experts > 0 && (groups->wide || offsets.is(dlpack::kInt, 32));
}

bool forward_arguments(const char* op, PyObject* const* given, Py_ssize_t count,
                       MatmulArguments* from) {
  if (count != 6 && count != 7) {
    PyErr_Format(PyExc_TypeError, "%s: takes 6 or 7 arguments", op);
    return false;
  }
  *from = {
      given[0], given[1], given[2], given[3], given[4], given[5], count == 7 ? given[6] : Py_None};
  return true;
}

bool input_gradient_arguments(const char* op, PyObject* const* given, Py_ssize_t count,
                              MatmulArguments* from) {
  if (count != 5) {
    PyErr_Format(PyExc_TypeError, "%s: takes 5 arguments", op);
    return false;
  }
  *from = {given[0], given[1], given[2], Py_None, given[3], given[4], Py_None};
  return true;
}

bool grouped_arguments(const char* op, PyObject* const* given, Py_ssize_t count,
                       MatmulArguments* from, PyObject** offsets) {
  if (count != 7 && count != 8) {
    PyErr_Format(PyExc_TypeError, "%s: takes 7 or 8 arguments", op);
    return false;
  }
  *offsets = given[3];
  *from = {
      given[0], given[1], given[2], given[4], given[5], given[6], count == 8 ? given[7] : Py_None};
  return true;
}

bool grouped_dx_arguments(const char* op, PyObject* const* given, Py_ssize_t count,
                          MatmulArguments* from, PyObject** offsets) {
  if (count != 6) {
    PyErr_Format(PyExc_TypeError, "%s: takes 6 arguments", op);
    return false;
  }
  *offsets = given[3];
  *from = {given[0], given[1], given[2], Py_None, given[4], given[5], Py_None};
  return true;
}

bool make_result(PyObject* object, const PlainTensor& x, Size features, py::object* result,
                 Linear4bitArgs* args) {
  *result = new_result(object, x, features);
  PlainTensor y(x.device());
  if (!y.read(result->ptr()) || !y.same_dtype(x) || y.contiguous_numel() != args->m * features) {
    return false;
  }
  args->y = y.data<void>();
  return true;
}

}  // namespace qkern::binding
