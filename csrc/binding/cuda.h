#pragma once

#include <pybind11/pybind11.h>

namespace qkern::binding {

// Adds the cuda_* functions: those of the CPU with device pointers, and a stream (a cudaStream_t as
// an integer) in place of the number of threads.
void bind_cuda(pybind11::module_& m);

// Adds cuda_on_tensors, which makes linear_4bit and linear_4bit_dx on tensors themselves; see
// cuda_tensors.cpp.
void bind_cuda_tensors(pybind11::module_& m);

}  // namespace qkern::binding
