#include "python.h"

#include <memory>
#include <vector>

namespace qkern::binding {
namespace {

namespace py = pybind11;

// What a function of an op is made from, which it owns.
struct Bound {
  std::string name;
  const Op& op;
  PyMethodDef definition;
};

void append(PyObject* object, std::vector<Size>* values) {
  if (PyList_Check(object) || PyTuple_Check(object)) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    if (PyList_Check(object)) values->push_back(count);
    for (Py_ssize_t i = 0; i < count; ++i) append(PySequence_Fast_GET_ITEM(object, i), values);
  } else if (object == Py_None) {
    values->push_back(kNone);
  } else {
    values->push_back(PyLong_AsLongLong(object));
    if (values->back() == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
}

PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  const Op& op = static_cast<const Bound*>(PyCapsule_GetPointer(self, nullptr))->op;
  return with_python_errors(op.name, [&]() -> PyObject* {
    std::vector<Size> values;
    values.reserve(static_cast<std::size_t>(count));
    for (Py_ssize_t i = 0; i < count; ++i) append(given[i], &values);
    Arguments from(values);
    run_without_gil(op.name, [&] { return op.run(from); });
    Py_RETURN_NONE;
  });
}

}  // namespace

void add_ops(py::module_& m, const char* prefix, const Op* ops, std::size_t count) {
  for (const Op* op = ops; op != ops + count; ++op) {
    auto bound = std::make_unique<Bound>(Bound{prefix + std::string(op->name), *op, {}});
    bound->definition = method(bound->name.c_str(), call);
    const std::string name = bound->name;
    PyMethodDef* const definition = &bound->definition;
    const py::capsule self(bound.release(), [](void* p) { delete static_cast<Bound*>(p); });
    PyObject* const function = PyCFunction_New(definition, self.ptr());
    if (function == nullptr) throw py::error_already_set();
    m.add_object(name.c_str(), py::reinterpret_steal<py::object>(function));
  }
}

}  // namespace qkern::binding
