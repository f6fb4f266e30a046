#pragma once

#include <pybind11/pybind11.h>

namespace qkern::binding {

// Adds linear_4bit, linear_4bit_dx and adamw_step on tensors themselves; see tensors.cpp.
void bind_tensors(pybind11::module_& m);

// True, or None where nothing was done.
PyObject* adamw_step_on_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* matmul_into_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* grouped_matmul_into_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count);

// The result, or None where nothing was done.
PyObject* grouped_linear_4bit_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* grouped_linear_4bit_dx_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* grouped_linear_4bit_add_on_tensors(PyObject*, PyObject* const* given, Py_ssize_t count);
PyObject* grouped_linear_4bit_dx_add_on_tensors(PyObject*, PyObject* const* given,
                                                Py_ssize_t count);

}  // namespace qkern::binding
