// What every function of the Python module shares: it is of Python's own C interface, because
// converting many arguments takes pybind11 longer than a small kernel runs; its errors become
// exceptions; and it lets go of the GIL while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "../cpu/thread_isa.h"
#include "arguments.h"

namespace qkern::binding {

using FastFunction = PyObject* (*)(PyObject* self, PyObject* const* given, Py_ssize_t count);

inline PyMethodDef method(const char* name, FastFunction function) {
  // By way of a type that compilers take for any function.
  const auto as_any = reinterpret_cast<void (*)()>(function);
  return {name, reinterpret_cast<PyCFunction>(as_any), METH_FASTCALL, nullptr};
}

inline void raise_on_error(const char* op, const Status& status) {
  if (status.ok()) return;
  std::string what = std::string(op) + ": " + status.message;
  if (status.detail != nullptr) what += std::string(": ") + status.detail;
  throw std::runtime_error(what);
}

// A variable of Python's contexts: the name of the instruction set that a block of code forces, or
// None. Set once, by the module's own initialisation, where it has the CPU's kernels.
inline PyObject* isa_variable = nullptr;

// That instruction set for the calling thread, while this lives. Made and destroyed with the GIL.
class ContextIsa {
 public:
  ContextIsa() : name_(current()), isa_(name_.is_none() ? nullptr : utf8()) {}

 private:
  static pybind11::object current() {
    PyObject* value = nullptr;
    if (isa_variable == nullptr) return pybind11::none();
    if (PyContextVar_Get(isa_variable, nullptr, &value) != 0) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }
  const char* utf8() const {
    const char* name = PyUnicode_AsUTF8(name_.ptr());
    if (name == nullptr) throw pybind11::error_already_set();
    return name;
  }

  pybind11::object name_;  // owns the characters
  cpu::ThreadIsa isa_;
};

// Calls a kernel without the GIL.
template <typename Kernel>
void run_without_gil(const char* op, const Kernel& kernel) {
  Status status;
  const ContextIsa isa;
  {
    pybind11::gil_scoped_release release;
    status = kernel();
  }
  raise_on_error(op, status);
}

// What `body` returns, a new reference; or nullptr, with its C++ exception as Python's.
template <typename Body>
PyObject* with_python_errors(const char* op, const Body& body) {
  try {
    return body();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::length_error& error) {
    PyErr_Format(PyExc_TypeError, "%s: %s", op, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Adds the functions `prefix` + name, which take integers (see arguments.h) and return None.
void add_ops(pybind11::module_& m, const char* prefix, const Op* ops, std::size_t count);

template <std::size_t kCount>
void add_ops(pybind11::module_& m, const char* prefix, const Op (&ops)[kCount]) {
  add_ops(m, prefix, ops, kCount);
}

}  // namespace qkern::binding
