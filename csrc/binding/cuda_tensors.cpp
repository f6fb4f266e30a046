// The matmuls on CUDA tensors themselves, as tensors.cpp has them for the CPU's: where a kernel
// takes microseconds, Python would take longer to start it than the device to run it.
//
// The answer is None, with nothing done, for whatever is unusual: qkern/backends then looks at the
// arguments in Python. That includes the path `gemm`, whose products are torch's.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "cuda.h"
#include "plain_tensor.h"
#include "python.h"
#include "read_matmul.h"

namespace qkern::binding {
namespace {

namespace py = pybind11;

constexpr Size kPieceBytes = 16;

// What the functions are made with, a tuple.
enum SelfItem {
  kChoose,      // what chooses a way: see choose_way
  kDeviceType,  // DLPack's, of the tensors that the kernels take
};

// A device made the current one while this lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device)
      : changed_(cuda::exchange_device(device, &before_).ok()), device_(device) {}
  ~CurrentDevice() {
    // It was the current one before, so this cannot fail in a way that others would not see.
    if (changed_ && before_ != device_) (void)cuda::exchange_device(before_, &device_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  bool is_made() const { return changed_; }

 private:
  int before_ = 0;
  bool changed_;
  int device_;
};

bool find_stream(dlpack::Device device, void** stream) {
  if (library.current_stream == nullptr) return false;
  if (library.current_stream(device.type, device.id, stream) == 0) return true;
  PyErr_Clear();
  return false;
}

// Whether QKERN_CUDA_PATH forces a path: its errors are Python's to raise.
bool is_path_forced() {
  const char* const path = std::getenv("QKERN_CUDA_PATH");
  return path != nullptr && *path != '\0';
}

bool in_pieces(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kPieceBytes == 0;
}

// The path of a matmul, and the bytes of workspace that it takes there, by `choose`: (device,
// input_gradient, dtype, m, out_features, in_features, experts, batch_invariant, aligned) to (path,
// workspace_bytes), or to None where it is none of C++'s paths. False for None. No experts are 0.
bool choose_way(PyObject* choose, dlpack::Device device, bool input_gradient, bool aligned,
                Size experts, Linear4bitArgs* args, Size* workspace_bytes) {
  const Size numbers[] = {device.id, input_gradient,    static_cast<Size>(args->dtype),
                          args->m,   args->weight.rows, args->weight.cols,
                          experts};
  constexpr std::size_t kNumbers = sizeof(numbers) / sizeof(*numbers);
  constexpr std::size_t kGiven = kNumbers + 2;
  PyObject* given[kGiven];
  bool complete = true;
  for (std::size_t i = 0; i < kNumbers; ++i) {
    given[i] = PyLong_FromLongLong(numbers[i]);
    complete = complete && given[i] != nullptr;
  }
  given[kNumbers] = args->batch_invariant ? Py_True : Py_False;
  given[kNumbers + 1] = aligned ? Py_True : Py_False;
  PyObject* const way = complete ? PyObject_Vectorcall(choose, given, kGiven, nullptr) : nullptr;
  for (std::size_t i = 0; i < kNumbers; ++i) Py_XDECREF(given[i]);
  if (way == nullptr) throw py::error_already_set();
  const auto found = py::reinterpret_steal<py::object>(way);
  if (found.is_none()) return false;
  Size path = 0;
  if (!PyTuple_Check(way) || PyTuple_GET_SIZE(way) != 2 ||
      !read_size(PyTuple_GET_ITEM(way, 0), &path) ||
      !read_size(PyTuple_GET_ITEM(way, 1), workspace_bytes) || path < 0 || path >= kCudaPaths ||
      *workspace_bytes < 0) {
    throw std::runtime_error("choose: takes None or (path, workspace_bytes)");
  }
  args->path = static_cast<CudaPath>(path);
  return true;
}

// x.new_empty(bytes / the size of an element of x), as the workspace.
py::object new_workspace(PyObject* x, Size bytes, dlpack::Device device, Linear4bitArgs* args) {
  const Size itemsize = args->dtype == DType::kFloat32 ? 4 : 2;
  const auto numel = py::reinterpret_steal<py::object>(PyLong_FromLongLong(bytes / itemsize));
  if (!numel) throw py::error_already_set();
  PyObject* given[] = {x, numel.ptr()};
  auto workspace = py::reinterpret_steal<py::object>(
      PyObject_VectorcallMethod(library.new_empty, given, 2, nullptr));
  if (!workspace) throw py::error_already_set();
  PlainTensor memory(device);
  if (!memory.read(workspace.ptr())) throw std::runtime_error("workspace: got no plain tensor");
  args->workspace = memory.data<float>();
  return workspace;
}

Status run_one(const GroupedLinear4bitArgs& args, bool input_gradient, void* stream) {
  return input_gradient ? cuda::linear_4bit_dx(args.all, stream)
                        : cuda::linear_4bit(args.all, stream);
}

Status run_grouped(const GroupedLinear4bitArgs& args, bool input_gradient, void* stream) {
  return input_gradient ? cuda::grouped_linear_4bit_dx(args, stream)
                        : cuda::grouped_linear_4bit(args, stream);
}

// `offsets` of a matmul by experts, else null.
PyObject* matmul(const char* op, bool input_gradient, PyObject* self, const MatmulArguments& from,
                 PyObject* offsets = nullptr) {
  return with_python_errors(op, [&]() -> PyObject* {
    GroupedLinear4bitArgs grouped;
    Linear4bitArgs& args = grouped.all;
    PlainTensor x;
    Size features = 0, num_threads = 0, device_type = 0, workspace_bytes = 0;
    if (offsets != nullptr &&
        (!x.read_anywhere(from.x) || !read_offsets(offsets, x.device(), &grouped.groups))) {
      Py_RETURN_NONE;
    }
    const Size experts = offsets == nullptr ? kOneWeight : grouped.groups.experts;
    if (is_path_forced() || !read_size(PyTuple_GET_ITEM(self, kDeviceType), &device_type) ||
        !read_arguments(from, input_gradient, static_cast<std::int32_t>(device_type), &x, &args,
                        &features, &num_threads, experts) ||
        args.x_row_stride < 0 || (offsets != nullptr && x.ndim() != 2)) {
      Py_RETURN_NONE;
    }
    const Size itemsize = args.dtype == DType::kFloat32 ? 4 : 2;
    const bool x_in_pieces = in_pieces(args.x) && args.x_row_stride * itemsize % kPieceBytes == 0;
    // Python copies such an x: in pieces every path can read it.
    const Size width = x.size(x.ndim() - 1);
    const bool whole_rows = args.weight.cols % 32 == 0 && width * itemsize % kPieceBytes == 0;
    if (whole_rows && !x_in_pieces) Py_RETURN_NONE;
    const dlpack::Device device = x.device();
    const CurrentDevice current(device.id);
    void* stream = nullptr;
    if (!current.is_made() || !find_stream(device, &stream) ||
        !choose_way(PyTuple_GET_ITEM(self, kChoose), device, input_gradient,
                    x_in_pieces && in_pieces(args.weight.packed), experts, &args,
                    &workspace_bytes)) {
      Py_RETURN_NONE;
    }
    py::object result, workspace;
    if (!make_result(from.x, x, features, &result, &args)) Py_RETURN_NONE;
    if (workspace_bytes > 0) {
      // torch hands it out again only to work that this stream does later.
      workspace = new_workspace(from.x, workspace_bytes, device, &args);
    }
    const auto run = offsets == nullptr ? run_one : run_grouped;
    run_without_gil(op, [&] { return run(grouped, input_gradient, stream); });
    return result.release().ptr();
  });
}

PyObject* linear_4bit(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  MatmulArguments from;
  if (!forward_arguments("linear_4bit", given, count, &from)) return nullptr;
  return matmul("linear_4bit", false, self, from);
}

PyObject* linear_4bit_dx(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  MatmulArguments from;
  if (!input_gradient_arguments("linear_4bit_dx", given, count, &from)) return nullptr;
  return matmul("linear_4bit_dx", true, self, from);
}

PyObject* grouped_linear_4bit(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  MatmulArguments from;
  PyObject* offsets = nullptr;
  if (!grouped_arguments("grouped_linear_4bit", given, count, &from, &offsets)) return nullptr;
  return matmul("grouped_linear_4bit", false, self, from, offsets);
}

PyObject* grouped_linear_4bit_dx(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  MatmulArguments from;
  PyObject* offsets = nullptr;
  if (!grouped_dx_arguments("grouped_linear_4bit_dx", given, count, &from, &offsets)) {
    return nullptr;
  }
  return matmul("grouped_linear_4bit_dx", true, self, from, offsets);
}

PyMethodDef methods[] = {
    method("linear_4bit", linear_4bit),
    method("linear_4bit_dx", linear_4bit_dx),
    method("grouped_linear_4bit", grouped_linear_4bit),
    method("grouped_linear_4bit_dx", grouped_linear_4bit_dx),
};

// The functions by op, which take what the CPU's functions on tensors take. `choose` is as
// choose_way calls it, `device_type` DLPack's number for the tensors' devices.
py::dict on_tensors(const py::object& choose, std::int32_t device_type) {
  const py::tuple self = py::make_tuple(choose, device_type);
  py::dict found;
  for (PyMethodDef& definition : methods) {
    PyObject* const function = PyCFunction_New(&definition, self.ptr());
    if (function == nullptr) throw py::error_already_set();
    found[definition.ml_name] = py::reinterpret_steal<py::object>(function);
  }
  return found;
}

}  // namespace

void bind_cuda_tensors(py::module_& m) {
  m.def("cuda_on_tensors", on_tensors, py::arg("choose"), py::arg("device_type") = dlpack::kCuda);
}

}  // namespace qkern::binding
