#include "plain_tensor.h"

#include <cstring>

namespace qkern::binding {
namespace {

namespace py = pybind11;

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

}  // namespace

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
  library.current_stream = api->current_stream;
  library.read = api->tensor_from_object;
  return true;
}

}  // namespace qkern::binding
