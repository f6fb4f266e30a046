// CPU ops on tensors themselves, read by DLPack's C exchange interface: for a small layer, or many
// small parameters, asking every tensor for its address and sizes in Python takes longer than the
// kernel.
//
// Nothing is explained here and nothing trusted. Unless every argument is what the kernel takes, in
// plain tensors, the answer is None and nothing has been done: qkern/backends then reads the
// arguments in Python, and raises the error that names the one at fault.
#include "tensors.h"

#include <cstddef>
#include <utility>
#include <vector>

#include "plain_tensor.h"
#include "python.h"
#include "read_matmul.h"

namespace qkern::binding {
namespace {

namespace py = pybind11;

using Kernel = Status (*)(const Linear4bitArgs& args, int num_threads);

PyObject* matmul(const char* op, Kernel kernel, bool input_gradient, const MatmulArguments& from) {
  return with_python_errors(op, [&]() -> PyObject* {
    Linear4bitArgs args;
    PlainTensor x;
    py::object copy, result;
    Size features = 0, num_threads = 0;
    if (!read_arguments(from, input_gradient, dlpack::kCpu, &x, &args, &features, &num_threads) ||
        (args.x_row_stride < 0 && !read_copied_rows(from.x, x, &copy, &args)) ||
        !make_result(from.x, x, features, &result, &args)) {
      Py_RETURN_NONE;
    }
    run_without_gil(op, [&] { return kernel(args, static_cast<int>(num_threads)); });
    return result.release().ptr();
  });
}

PyObject* forward(const char* op, Kernel kernel, PyObject* const* given, Py_ssize_t count) {
  MatmulArguments from;
  if (!forward_arguments(op, given, count, &from)) return nullptr;
  return matmul(op, kernel, false, from);
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
      const bool read =
          i == 0 ? read_arguments(from, false, dlpack::kCpu, &x, &args, &features[0], &num_threads)
                 : read_size(from.features, &features[i]) &&
                       read_weight(from.weight, features[i], products[0].weight.cols, x.device(),
                                   &args.weight) &&
                       read_bias(from.bias, x, features[i], &args);
      if (!read ||
          (i == 0 && args.x_row_stride < 0 && !read_copied_rows(given[0], x, &copy, &args))) {
        Py_RETURN_NONE;
      }
    }
    py::tuple results(static_cast<std::size_t>(number));
    for (std::size_t i = 0; i < products.size(); ++i) {
      py::object result;
      if (!make_result(given[0], x, features[i], &result, &products[i])) Py_RETURN_NONE;
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

PyObject* linear_4bit_dx(PyObject*, PyObject* const* given, Py_ssize_t count) {
  MatmulArguments from;
  if (!input_gradient_arguments("linear_4bit_dx", given, count, &from)) return nullptr;
  return matmul("linear_4bit_dx", cpu::linear_4bit_dx, true, from);
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

PyMethodDef methods[] = {
    method("linear_4bit_on_tensors", linear_4bit),
    method("linear_4bit_int8_on_tensors", linear_4bit_int8),
    method("linear_4bit_dx_on_tensors", linear_4bit_dx),
    method("linear_4bit_add_on_tensors", linear_4bit_add),
    method("linear_4bit_dx_add_on_tensors", linear_4bit_dx_add),
    method("linears_4bit_on_tensors", linears_4bit),
    method("adamw_step_on_tensors", adamw_step_on_tensors),
    method("matmul_into_on_tensors", matmul_into_on_tensors),
    method("grouped_linear_4bit_on_tensors", grouped_linear_4bit_on_tensors),
    method("grouped_linear_4bit_dx_on_tensors", grouped_linear_4bit_dx_on_tensors),
    method("grouped_linear_4bit_add_on_tensors", grouped_linear_4bit_add_on_tensors),
    method("grouped_linear_4bit_dx_add_on_tensors", grouped_linear_4bit_dx_add_on_tensors),
    method("grouped_matmul_into_on_tensors", grouped_matmul_into_on_tensors),
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
