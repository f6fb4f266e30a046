#pragma once

#include <pybind11/pybind11.h>

namespace qkern::binding {

// Adds linear_4bit and linear_4bit_dx on tensors themselves; see tensors.cpp.
void bind_tensors(pybind11::module_& m);

}  // namespace qkern::binding
