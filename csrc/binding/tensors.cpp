// CPU ops on tensors themselves, read by DLPack's C exchange interface: for a small layer, or many
// small parameters, asking every tensor for its address and sizes in Python takes longer than the
// kernel.
//
// Nothing is explained here and nothing trusted. Unless every argument is what the kernel takes, in
// plain tensors, the answer is None and nothing has been done: qkern/backends then reads the
// arguments in Python, and raises the error that names the one at fault.
#include "tensors.h"

#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "plain_tensor.h"
#include "python.h"

namespace qkern::binding {
namespace {

namespace py = pybind11;

constexpr int kMostDimensions = 8;

bool read_codes(PyObject* format, PyObject* codebook, Codebook* codes) {
  if (!PyUnicode_CheckExact(format)) return false;
  if (PyUnicode_CompareWithASCIIString(format, "custom") == 0) {
    PlainTensor values;
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

bool read_weight(PyObject* object, Size rows, Size cols, Weight4bit* weight) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != kWeightItems) return false;
  const auto item = [&](WeightItem i) { return PyTuple_GET_ITEM(object, i); };
  PlainTensor packed, absmax, nested_absmax, nested_offset;
  if (!packed.read(item(kPacked)) || !packed.is(dlpack::kUInt, 8)) return false;
  const Size bytes = packed.contiguous_numel();
  // Divided first, since the product of wrong sizes may not fit in 64 bits.
  if (rows <= 0 || cols <= 0 || bytes <= 0 || rows > 2 * bytes / cols) return false;
  const Size numel = rows * cols;
  Size block_size = 0;
  if (bytes != numel / 2 + numel % 2 || !read_size(item(kBlockSize), &block_size) ||
      !is_block_size(block_size)) {
    return false;
  }
  const Size blocks = (numel - 1) / block_size + 1;
  if (item(kNestedAbsmax) == Py_None) {
    if (!absmax.read_float32_bits(item(kAbsmax), blocks) || item(kNestedOffset) != Py_None) {
      return false;
    }
  } else {
    const Size groups = (blocks - 1) / kNestedBlockSize + 1;
    if (!absmax.read(item(kAbsmax), dlpack::kUInt, 8, blocks) ||
        !nested_absmax.read_float32_bits(item(kNestedAbsmax), groups) ||
        !nested_offset.read_float32_bits(item(kNestedOffset), 1)) {
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
  return read_codes(item(kFormat), item(kCodebook), &weight->codes);
}

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

// x's elements one after the other, in a copy that `copy` keeps alive.
bool read_copied_rows(PyObject* object, const PlainTensor& x, py::object* copy,
                      Linear4bitArgs* args) {
  *copy = contiguous(object);
  PlainTensor rows;
  if (!rows.read(copy->ptr()) || !rows.same_dtype(x) || rows.contiguous_numel() != x.numel()) {
    return false;
  }
  args->x = rows.data<const void>();
  args->x_row_stride = x.size(x.ndim() - 1);
  return true;
}

bool read_bias(PyObject* object, const PlainTensor& x, Size features, Linear4bitArgs* args) {
  if (object == Py_None) return true;
  PlainTensor bias;
  if (!bias.read(object) || !bias.same_dtype(x) || bias.ndim() != 1 ||
      bias.contiguous_numel() != features || is_negated(object)) {
    return false;
  }
  args->bias = bias.data<const void>();
  return true;
}

// The arguments of both matmuls, by name. `width` is the size that x's last dimension must have, or
// None; `features` is the result's.
struct MatmulArguments {
  PyObject *x, *weight, *features, *bias, *batch_invariant, *num_threads, *width;
  // Of the term that is added; absent where `left` is.
  PyObject *left = nullptr, *right = nullptr, *alpha = nullptr;
};

// alpha left [m, rank] right [rank, features], both float32.
bool read_added(const MatmulArguments& from, Size m, Size features, LowRank* added) {
  PlainTensor left, right;
  if (!left.read(from.left) || !right.read(from.right) || !left.is(dlpack::kFloat, 32) ||
      !right.is(dlpack::kFloat, 32) || left.ndim() != 2 || right.ndim() != 2 || left.numel() <= 0 ||
      right.numel() <= 0 || left.size(0) != m || right.size(0) != left.size(1) ||
      right.size(1) != features || (left.size(1) > 1 && left.stride(1) != 1) ||
      !PyFloat_Check(from.alpha) || is_negated(from.left) || is_negated(from.right)) {
    return false;
  }
  added->rank = left.size(1);
  added->left = left.data<const float>();
  added->left_row_stride = left.stride(0);
  added->right = right.data<const float>();
  added->right_row_stride = right.stride(0);
  added->right_col_stride = right.stride(1);
  added->alpha = static_cast<float>(PyFloat_AS_DOUBLE(from.alpha));
  return true;
}

bool read_arguments(const MatmulArguments& from, bool input_gradient, PlainTensor* x,
                    Linear4bitArgs* args, Size* features, Size* num_threads) {
  if (library.read == nullptr || !x->read(from.x) || !read_rows(*x, args) ||
      !read_size(from.features, features) || !read_size(from.num_threads, num_threads) ||
      *num_threads < 1 || *num_threads > INT_MAX || !PyBool_Check(from.batch_invariant)) {
    return false;
  }
  args->batch_invariant = from.batch_invariant == Py_True;
  const Size width = x->size(x->ndim() - 1);
  Size expected = width;
  if (from.width != Py_None && !read_size(from.width, &expected)) return false;
  const Size rows = input_gradient ? width : *features;
  const Size cols = input_gradient ? *features : width;
  return width == expected && read_weight(from.weight, rows, cols, &args->weight) &&
         read_bias(from.bias, *x, *features, args) && !is_negated(from.x) &&
         (from.left == nullptr || read_added(from, args->m, *features, &args->added));
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

using Kernel = Status (*)(const Linear4bitArgs& args, int num_threads);

PyObject* matmul(const char* op, Kernel kernel, bool input_gradient, const MatmulArguments& from) {
  return with_python_errors(op, [&]() -> PyObject* {
    Linear4bitArgs args;
    PlainTensor x, y;
    py::object copy;
    Size features = 0, num_threads = 0;
    if (!read_arguments(from, input_gradient, &x, &args, &features, &num_threads) ||
        (args.x_row_stride < 0 && !read_copied_rows(from.x, x, &copy, &args))) {
      Py_RETURN_NONE;
    }
    py::object result = new_result(from.x, x, features);
    if (!y.read(result.ptr()) || !y.same_dtype(x) || y.contiguous_numel() != args.m * features) {
      Py_RETURN_NONE;
    }
    args.y = y.data<void>();
    run_without_gil(op, [&] { return kernel(args, static_cast<int>(num_threads)); });
    return result.release().ptr();
  });
}

// (x, weight, out_features, bias, batch_invariant, num_threads[, in_features])
PyObject* forward(const char* op, Kernel kernel, PyObject* const* given, Py_ssize_t count) {
  if (count != 6 && count != 7) {
    PyErr_Format(PyExc_TypeError, "%s: takes 6 or 7 arguments", op);
    return nullptr;
  }
  return matmul(op, kernel, false,
                {given[0], given[1], given[2], given[3], given[4], given[5],
                 count == 7 ? given[6] : Py_None});
}

// The products of one x with several weights, all by one reading of x: (x, weights, out_features,
// biases, batch_invariant, num_threads, in_features), where weights, out_features and biases are
// tuples of one length. The tuple of results, or None with nothing done.
PyObject* linears_4bit(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 7 || !PyTuple_Check(given[1]) || !PyTuple_Check(given[2]) ||
      !PyTuple_Check(given[3])) {
    PyErr_SetString(PyExc_TypeError, "linears_4bit: takes 7 arguments, of them 3 tuples");
    return nullptr;
  }
  return with_python_errors("linears_4bit", [&]() -> PyObject* {
    const Py_ssize_t number = PyTuple_GET_SIZE(given[1]);
    if (PyTuple_GET_SIZE(given[2]) != number || PyTuple_GET_SIZE(given[3]) != number) {
      Py_RETURN_NONE;
    }
    PlainTensor x;
    py::object copy;
    Size num_threads = 0;
    std::vector<Linear4bitArgs> products(static_cast<std::size_t>(number));
    std::vector<Size> features(products.size());
    for (std::size_t i = 0; i < products.size(); ++i) {
      const auto at = static_cast<Py_ssize_t>(i);
      const MatmulArguments from = {given[0],
                                    PyTuple_GET_ITEM(given[1], at),
                                    PyTuple_GET_ITEM(given[2], at),
                                    PyTuple_GET_ITEM(given[3], at),
                                    given[4],
                                    given[5],
                                    given[6]};
      Linear4bitArgs& args = products[i];
      if (i > 0) args = products[0];  // which has x, and a weight and a bias of its own
      args.weight = {};
      args.bias = nullptr;
      const bool read = i == 0 ? read_arguments(from, false, &x, &args, &features[0], &num_threads)
                               : read_size(from.features, &features[i]) &&
                                     read_weight(from.weight, features[i], products[0].weight.cols,
                                                 &args.weight) &&
                                     read_bias(from.bias, x, features[i], &args);
      if (!read ||
          (i == 0 && args.x_row_stride < 0 && !read_copied_rows(given[0], x, &copy, &args))) {
        Py_RETURN_NONE;
      }
    }
    py::tuple results(static_cast<std::size_t>(number));
    for (std::size_t i = 0; i < products.size(); ++i) {
      PlainTensor y;
      py::object result = new_result(given[0], x, features[i]);
      if (!y.read(result.ptr()) || !y.same_dtype(x) ||
          y.contiguous_numel() != products[i].m * features[i]) {
        Py_RETURN_NONE;
      }
      products[i].y = y.data<void>();
      results[i] = std::move(result);
    }
    run_without_gil("linears_4bit", [&] {
      for (const Linear4bitArgs& args : products) {
        const Status status = cpu::linear_4bit(args, static_cast<int>(num_threads));
        if (!status.ok()) return status;
      }
      return Status::success();
    });
    return results.release().ptr();
  });
}

PyObject* linear_4bit(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return forward("linear_4bit", cpu::linear_4bit, given, count);
}

PyObject* linear_4bit_int8(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return forward("linear_4bit_int8", cpu::linear_4bit_int8, given, count);
}

// (dy, weight, in_features, batch_invariant, num_threads)
PyObject* linear_4bit_dx(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "linear_4bit_dx: takes 5 arguments");
    return nullptr;
  }
  return matmul("linear_4bit_dx", cpu::linear_4bit_dx, true,
                {given[0], given[1], given[2], Py_None, given[3], given[4], Py_None});
}

// (x, weight, out_features, bias, left, right, alpha, batch_invariant, num_threads)
PyObject* linear_4bit_add(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 9) {
    PyErr_SetString(PyExc_TypeError, "linear_4bit_add: takes 9 arguments");
    return nullptr;
  }
  return matmul("linear_4bit_add", cpu::linear_4bit, false,
                {given[0], given[1], given[2], given[3], given[7], given[8], Py_None, given[4],
                 given[5], given[6]});
}

// (dy, weight, in_features, left, right, alpha, batch_invariant, num_threads)
PyObject* linear_4bit_dx_add(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 8) {
    PyErr_SetString(PyExc_TypeError, "linear_4bit_dx_add: takes 8 arguments");
    return nullptr;
  }
  return matmul("linear_4bit_dx_add", cpu::linear_4bit_dx, true,
                {given[0], given[1], given[2], Py_None, given[6], given[7], Py_None, given[3],
                 given[4], given[5]});
}

// (tensor, kind, numel): whether it is plain, though on any device, and contiguous, has so many
// elements, one or more, and a storage with all of them. `kind` is its dtype as DLPack has it, the
// code times 256 plus the bits.
PyObject* tensor_holds(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "tensor_holds: takes 3 arguments");
    return nullptr;
  }
  PlainTensor tensor;
  Size kind = 0, numel = 0;
  return PyBool_FromLong(read_size(given[1], &kind) && read_size(given[2], &numel) &&
                         tensor.read_anywhere(given[0]) &&
                         tensor.is(static_cast<int>(kind / 256), static_cast<int>(kind % 256)) &&
                         tensor.contiguous_numel() == numel);
}

// (tensor): whether it is plain, though on any device and not contiguous perhaps, and its storage
// has all of its elements.
PyObject* tensor_has_memory(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 1) {
    PyErr_SetString(PyExc_TypeError, "tensor_has_memory: takes 1 argument");
    return nullptr;
  }
  return PyBool_FromLong(PlainTensor().read_anywhere(given[0]));
}

// The bytes from each of `probes`, tensors, to its at::Tensor, which holds the address that torch
// tells of as `_cdata`; 0 where they differ or there is none.
std::size_t find_at_tensor(const py::list& probes) {
  std::size_t found = 0;
  for (const py::handle probe : probes) {
    const auto implementation = probe.attr("_cdata").cast<std::uintptr_t>();
    std::size_t at = sizeof(PyObject);
    const auto size = static_cast<std::size_t>(Py_TYPE(probe.ptr())->tp_basicsize);
    const auto word = [&] {
      std::uintptr_t value = 0;
      std::memcpy(&value, reinterpret_cast<const char*>(probe.ptr()) + at, sizeof(value));
      return value;
    };
    while (at + sizeof(std::uintptr_t) <= size && word() != implementation) at += sizeof(void*);
    if (at + sizeof(std::uintptr_t) > size || (found != 0 && found != at)) return 0;
    found = at;
  }
  return found;
}

// Whether tensors of the types of `probes`, a tensor and a parameter, can be read by the interface
// in `capsule` and by torch's functions at the addresses `storage_bytes` and `storage_offset`.
bool read_tensors_with(const py::object& capsule, const py::list& probes,
                       std::uintptr_t storage_bytes, std::uintptr_t storage_offset) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major_version != dlpack::kMajorVersion) api = api->previous;
  const std::size_t at_tensor = find_at_tensor(probes);
  if (api == nullptr || api->tensor_from_object == nullptr || at_tensor == 0) return false;
  library.new_empty = PyUnicode_InternFromString("new_empty");
  library.is_neg = PyUnicode_InternFromString("is_neg");
  library.contiguous = PyUnicode_InternFromString("contiguous");
  if (library.new_empty == nullptr || library.is_neg == nullptr || library.contiguous == nullptr) {
    throw py::error_already_set();
  }
  library.tensor = reinterpret_cast<PyTypeObject*>(py::type::of(probes[0]).inc_ref().ptr());
  library.parameter = reinterpret_cast<PyTypeObject*>(py::type::of(probes[1]).inc_ref().ptr());
  library.at_tensor = at_tensor;
  library.storage_bytes = reinterpret_cast<int (*)(void*, std::int64_t*)>(storage_bytes);
  library.storage_offset = reinterpret_cast<int (*)(void*, std::int64_t*)>(storage_offset);
  library.read = api->tensor_from_object;
  return true;
}

PyMethodDef methods[] = {
    method("linear_4bit_on_tensors", linear_4bit),
    method("linear_4bit_int8_on_tensors", linear_4bit_int8),
    method("linear_4bit_dx_on_tensors", linear_4bit_dx),
    method("linear_4bit_add_on_tensors", linear_4bit_add),
    method("linear_4bit_dx_add_on_tensors", linear_4bit_dx_add),
    method("linears_4bit_on_tensors", linears_4bit),
    method("adamw_step_on_tensors", adamw_step_on_tensors),
    method("matmul_into_on_tensors", matmul_into_on_tensors),
    method("tensor_holds", tensor_holds),
    method("tensor_has_memory", tensor_has_memory),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_tensors(py::module_& m) {
  m.def("read_tensors_with", read_tensors_with);
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace qkern::binding
