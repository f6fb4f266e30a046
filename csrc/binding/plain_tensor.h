// Python's tensors, read by DLPack's C exchange interface. It tells nothing of the storage behind a
// tensor, which frameworks free and shrink while the tensor lives; torch's C interface does.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

#include "arguments.h"
#include "dlpack.h"

namespace qkern::binding {

// Set by read_tensors_with.
struct Library {
  int (*read)(void*, dlpack::Tensor*) = nullptr;
  // The stream that torch's work on a device goes to; null where the interface does not tell.
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out) = nullptr;
  // Of torch's C interface, on the address of an at::Tensor: the bytes of its storage, and the
  // first element's place there. Not 0 on failure.
  int (*storage_bytes)(void*, std::int64_t*) = nullptr;
  int (*storage_offset)(void*, std::int64_t*) = nullptr;
  std::size_t at_tensor = 0;  // bytes from a Python tensor to its at::Tensor
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* new_empty = nullptr;  // names of methods
  PyObject* is_neg = nullptr;
  PyObject* contiguous = nullptr;
};

inline Library library;

// Whether tensors of the types of `probes`, a tensor and a parameter, can be read by the interface
// in `capsule` and by torch's functions at the addresses `storage_bytes` and `storage_offset`.
bool read_tensors_with(const pybind11::object& capsule, const pybind11::list& probes,
                       std::uintptr_t storage_bytes, std::uintptr_t storage_offset);

// A dense tensor in the memory of one device, of no subclass: one may mean something else by its
// elements.
class PlainTensor {
 public:
  explicit PlainTensor(dlpack::Device device = dlpack::kCpuDevice) : wanted_(device) {}

  // False where `object` is no such tensor.
  bool read(PyObject* object) {
    return read_anywhere(object) && device().type == wanted_.type && device().id == wanted_.id;
  }

  // As read(), in the memory of any device.
  bool read_anywhere(PyObject* object) {
    if (Py_TYPE(object) != library.tensor && Py_TYPE(object) != library.parameter) return false;
    if (library.read(object, &tensor_) != 0) {
      PyErr_Clear();
      return false;
    }
    return tensor_.dtype.lanes == 1 && tensor_.byte_offset == 0 && tensor_.data != nullptr &&
           (tensor_.ndim == 0 || (tensor_.shape != nullptr && tensor_.strides != nullptr)) &&
           fits_storage(object);
  }

  // As read(), and whether the tensor is contiguous, of `numel` elements of a dtype.
  bool read(PyObject* object, dlpack::DataTypeCode code, int bits, Size numel) {
    return read(object) && is(code, bits) && contiguous_numel() == numel;
  }

  // As read(), of float32 or of int32 that holds a float32's bits: frameworks cast floating
  // parameters, so a weight may keep its scales as integers.
  bool read_float32_bits(PyObject* object, Size numel) {
    return read(object) && (is(dlpack::kFloat, 32) || is(dlpack::kInt, 32)) &&
           contiguous_numel() == numel;
  }

  bool is(int code, int bits) const {
    return tensor_.dtype.code == code && tensor_.dtype.bits == bits;
  }

  bool same_dtype(const PlainTensor& other) const {
    return is(other.tensor_.dtype.code, other.tensor_.dtype.bits);
  }

  bool floating(DType* dtype) const {
    if (is(dlpack::kFloat, 32)) {
      *dtype = DType::kFloat32;
    } else if (is(dlpack::kBfloat, 16)) {
      *dtype = DType::kBFloat16;
    } else if (is(dlpack::kFloat, 16)) {
      *dtype = DType::kFloat16;
    } else {
      return false;
    }
    return true;
  }

  // The number of elements, or -1 where they are not contiguous.
  Size contiguous_numel() const {
    Size numel = 1;
    for (int i = tensor_.ndim - 1; i >= 0; --i) {
      if (tensor_.shape[i] != 1 && tensor_.strides[i] != numel) return -1;
      numel *= tensor_.shape[i];
    }
    return numel;
  }

  Size numel() const {
    Size numel = 1;
    for (int i = 0; i < tensor_.ndim; ++i) numel *= tensor_.shape[i];
    return numel;
  }

  // The distance between rows, which lie along the last dimension, or -1 where the elements of a
  // row are apart or the rows are not evenly spaced.
  Size row_stride() const {
    const int last = tensor_.ndim - 1;
    if (tensor_.shape[last] != 1 && tensor_.strides[last] != 1) return -1;
    Size stride = -1, next = -1;
    for (int i = last - 1; i >= 0; --i) {
      if (tensor_.shape[i] == 1) continue;
      if (stride == -1) {
        stride = next = tensor_.strides[i];
      } else if (tensor_.strides[i] != next) {
        return -1;
      }
      next *= tensor_.shape[i];
    }
    return stride == -1 ? tensor_.shape[last] : stride;
  }

  dlpack::Device device() const { return tensor_.device; }
  int ndim() const { return tensor_.ndim; }
  Size size(int i) const { return tensor_.shape[i]; }
  Size stride(int i) const { return tensor_.strides[i]; }

  template <typename T>
  T* data() const {
    return static_cast<T*>(tensor_.data);
  }

 private:
  // Whether the storage has all elements.
  bool fits_storage(PyObject* object) const {
    void* const tensor = reinterpret_cast<char*>(object) + library.at_tensor;
    std::int64_t bytes = 0, offset = 0;
    if (library.storage_bytes(tensor, &bytes) != 0 ||
        library.storage_offset(tensor, &offset) != 0) {
      return false;
    }
    Size last = offset;
    for (int i = 0; i < tensor_.ndim; ++i) {
      if (tensor_.shape[i] == 0) return true;
      last += (tensor_.shape[i] - 1) * tensor_.strides[i];
    }
    return last < bytes * 8 / tensor_.dtype.bits;
  }

  dlpack::Tensor tensor_{};
  dlpack::Device wanted_;
};

// Whether memory holds the negated elements, which DLPack does not tell.
inline bool is_negated(PyObject* tensor) {
  PyObject* negated = PyObject_CallMethodNoArgs(tensor, library.is_neg);
  if (negated == nullptr) throw pybind11::error_already_set();
  Py_DECREF(negated);
  return negated != Py_False;
}

inline pybind11::object contiguous(PyObject* tensor) {
  PyObject* copy = PyObject_CallMethodNoArgs(tensor, library.contiguous);
  if (copy == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(copy);
}

inline bool read_size(PyObject* object, Size* size) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  *size = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

}  // namespace qkern::binding
