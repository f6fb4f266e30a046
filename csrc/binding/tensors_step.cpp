// A step of the optimizer on tensors themselves, as tensors.cpp has the matmuls.
#include <climits>
#include <cstdint>
#include <utility>
#include <vector>

#include "plain_tensor.h"
#include "python.h"
#include "tensors.h"

namespace qkern::binding {
namespace {

namespace py = pybind11;

// The items of a list or tuple, while it lives.
class Items {
 public:
  explicit Items(PyObject* sequence) : items_(PySequence_Fast(sequence, "takes a list")) {
    if (items_ == nullptr) throw py::error_already_set();
  }
  ~Items() { Py_DECREF(items_); }
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;

  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(items_); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(items_, i); }

 private:
  PyObject* items_;
};

// The positions of adamw_step's arguments.
enum StepArgument {
  kParams,
  kGrads,
  kExpAvgs,
  kExpAvgSqs,
  kExpAvgAbsmaxes,
  kExpAvgSqAbsmaxes,
  kFactors,
  kSeed,
  kIndices,
  kOffsets,
  kStepThreads,
  kStepArguments,
};

// One of the moments of a parameter, and its scales where `absmaxes` has any.
bool read_moment(PyObject* object, const Items& absmaxes, Py_ssize_t k, Size numel, void** moment,
                 float** absmax) {
  PlainTensor values, scales;
  const bool codes = absmaxes.size() != 0;
  const Size blocks = (numel - 1) / kStateBlockSize + 1;
  if (!values.read(object, codes ? dlpack::kUInt : dlpack::kFloat, codes ? 8 : 32, numel) ||
      (codes &&
       (!scales.read(absmaxes[k], dlpack::kFloat, 32, blocks) || is_negated(absmaxes[k]))) ||
      is_negated(object)) {
    return false;
  }
  *moment = values.data<void>();
  *absmax = scales.data<float>();
  return true;
}

bool read_step(PyObject* const* arguments, std::vector<AdamWTensor>* tensors) {
  const Items params(arguments[kParams]), grads(arguments[kGrads]);
  const Items exp_avgs(arguments[kExpAvgs]), exp_avg_sqs(arguments[kExpAvgSqs]);
  const Items absmaxes(arguments[kExpAvgAbsmaxes]), sq_absmaxes(arguments[kExpAvgSqAbsmaxes]);
  const Items indices(arguments[kIndices]), offsets(arguments[kOffsets]);
  const Py_ssize_t count = params.size();
  const Py_ssize_t scales = absmaxes.size();
  if (grads.size() != count || exp_avgs.size() != count || exp_avg_sqs.size() != count ||
      indices.size() != count || offsets.size() != count || (scales != 0 && scales != count) ||
      sq_absmaxes.size() != scales) {
    return false;
  }
  PlainTensor factors;
  if (!factors.read(arguments[kFactors]) || factors.ndim() != 2 ||
      factors.size(1) != kAdamWFactors || !factors.is(dlpack::kFloat, 32) ||
      factors.contiguous_numel() < 0 || is_negated(arguments[kFactors])) {
    return false;
  }
  tensors->resize(static_cast<std::size_t>(count));
  for (Py_ssize_t k = 0; k < count; ++k) {
    AdamWTensor& tensor = (*tensors)[static_cast<std::size_t>(k)];
    PlainTensor param, grad;
    if (!param.read(params[k]) || !param.floating(&tensor.dtype) || !grad.read(grads[k]) ||
        !grad.same_dtype(param) || is_negated(params[k]) || is_negated(grads[k])) {
      return false;
    }
    tensor.numel = param.contiguous_numel();
    if (tensor.numel <= 0 || grad.contiguous_numel() != tensor.numel ||
        !read_moment(exp_avgs[k], absmaxes, k, tensor.numel, &tensor.exp_avg,
                     &tensor.exp_avg_absmax) ||
        !read_moment(exp_avg_sqs[k], sq_absmaxes, k, tensor.numel, &tensor.exp_avg_sq,
                     &tensor.exp_avg_sq_absmax) ||
        !read_size(indices[k], &tensor.index) || tensor.index < 0 ||
        tensor.index >= factors.size(0) || !read_size(offsets[k], &tensor.first) ||
        tensor.first < 0 || tensor.first % kStateBlockSize != 0) {
      return false;
    }
    tensor.param = param.data<void>();
    tensor.grad = grad.data<const void>();
    tensor.factors = factors.data<const AdamWFactors>() + tensor.index;
  }
  return true;
}

}  // namespace

PyObject* adamw_step_on_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kStepArguments) {
    PyErr_Format(PyExc_TypeError, "adamw_step: takes %d arguments", int{kStepArguments});
    return nullptr;
  }
  return with_python_errors("adamw_step", [&]() -> PyObject* {
    std::vector<AdamWTensor> tensors;
    Size seed = kNone, num_threads = 0;
    if (library.read == nullptr ||
        (arguments[kSeed] != Py_None && (!read_size(arguments[kSeed], &seed) || seed < 0)) ||
        !read_size(arguments[kStepThreads], &num_threads) || num_threads < 1 ||
        num_threads > INT_MAX || !read_step(arguments, &tensors)) {
      Py_RETURN_NONE;
    }
    const AdamWStep step(std::move(tensors), seed);
    run_without_gil("adamw_step",
                    [&] { return cpu::adamw_step(step, static_cast<int>(num_threads)); });
    Py_RETURN_TRUE;
  });
}

}  // namespace qkern::binding
