// The arguments of the matmuls of a 4-bit weight, read from Python's tensors. Nothing is explained
// and nothing trusted: false is that something is not what a kernel takes, or not in a plain tensor
// of one device.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "arguments.h"
#include "plain_tensor.h"

namespace qkern::binding {

inline constexpr int kMostDimensions = 8;

// The arguments of both matmuls, by name. `width` is the size that x's last dimension must have, or
// None; `features` is the result's.
struct MatmulArguments {
  PyObject *x, *weight, *features, *bias, *batch_invariant, *num_threads, *width;
  // Of the term that is added; absent where `left` is.
  PyObject *left = nullptr, *right = nullptr, *alpha = nullptr;
};

// In place of a number of experts: the weight is one, not several of one shape.
inline constexpr Size kOneWeight = 0;

// (x, weight, out_features, bias, batch_invariant, num_threads[, in_features]), and without a bias
// (dy, weight, in_features, batch_invariant, num_threads); else a Python exception.
bool forward_arguments(const char* op, PyObject* const* given, Py_ssize_t count,
                       MatmulArguments* from);
bool input_gradient_arguments(const char* op, PyObject* const* given, Py_ssize_t count,
                              MatmulArguments* from);

// The same by experts: (x, weight, out_features, offsets, bias, batch_invariant, num_threads[,
// in_features]), and without a bias (dy, weight, in_features, offsets, batch_invariant,
// num_threads).
bool grouped_arguments(const char* op, PyObject* const* given, Py_ssize_t count,
                       MatmulArguments* from, PyObject** offsets);
bool grouped_dx_arguments(const char* op, PyObject* const* given, Py_ssize_t count,
                          MatmulArguments* from, PyObject** offsets);

// All but the result, which has `features` columns. `x` must be on a device of `device_type`, all
// other tensors on the same one. Where x's memory cannot be read as a matrix, args->x_row_stride is
// negative, and read_copied_rows makes it one. Of `experts`, all fields hold so many one after the
// other: the weight's, the bias, and the right factor of the term.
bool read_arguments(const MatmulArguments& from, bool input_gradient, std::int32_t device_type,
                    PlainTensor* x, Linear4bitArgs* args, Size* features, Size* num_threads,
                    Size experts = kOneWeight);

// Where the rows of one or more experts end, whose numbers are not looked at.
bool read_offsets(PyObject* object, dlpack::Device device, GroupOffsets* groups);

// x's elements one after the other, in a copy that `copy` keeps alive.
bool read_copied_rows(PyObject* object, const PlainTensor& x, pybind11::object* copy,
                      Linear4bitArgs* args);

// What read_arguments reads of another product of the same x.
bool read_weight(PyObject* object, Size rows, Size cols, dlpack::Device device, Weight4bit* weight,
                 Size experts = kOneWeight);
bool read_bias(PyObject* object, const PlainTensor& x, Size features, Linear4bitArgs* args,
               Size experts = kOneWeight);

// A tensor for the result, of `features` columns, where x is; its address goes to args->y.
bool make_result(PyObject* object, const PlainTensor& x, Size features, pybind11::object* result,
                 Linear4bitArgs* args);

}  // namespace qkern::binding
