// The Python module qkern._C: integers in (see arguments.h), kernels called, errors out.
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "cpu_ops.h"
#include "cuda.h"
#include "python.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

using namespace qkern::binding;

py::list available_isas() {
  const char* names[qkern::cpu::kMaxIsas];
  const int count = qkern::cpu::available_isas(names);
  py::list list;
  for (int i = 0; i < count; ++i) list.append(names[i]);
  return list;
}

std::string isa() {
  const qkern::cpu::KernelTable* table = qkern::cpu::active_kernels();
  if (table == nullptr) {
    throw py::value_error(
        "QKERN_CPU_ISA: names no instruction set that this build and processor have");
  }
  return table->name;
}

void set_isa(const std::string& name) {
  if (!qkern::cpu::set_isa(name.c_str()).ok()) {
    throw py::value_error("isa: got '" + name + "'; takes one of " +
                          std::string(py::str(available_isas())));
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = QKERN_VERSION;
  info["compiler"] = QKERN_COMPILER;
  info["cxx_flags"] = QKERN_CXX_FLAGS;
  info["threads"] = qkern::cpu::parallel_runtime();
#ifdef QKERN_HAVE_CUDA
  info["cuda"] = QKERN_CUDA_BUILD;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "qkern's native kernels, on pointers and sizes. Use the functions of qkern instead.";
  m.attr("version") = QKERN_VERSION;
  add_ops(m, "", kCpuOps);
  bind_tensors(m);
#ifdef QKERN_HAVE_CUDA
  bind_cuda(m);
#endif
  m.def("isa", isa, "Name of the instruction set in force.");
  m.def("available_isas", available_isas, "Names of those that this processor runs, worst first.");
  m.def(
      "multiplies_bfloat16", qkern::cpu::multiplies_bfloat16,
      "Whether the processor multiplies bfloat16, by instructions not wider than those in force.");
  m.def("set_isa", set_isa, "Force an instruction set; '' goes back to the default.");
  m.def("build_info", build_info);
  m.def(
      "scratch_bytes",
      [](bool reset) { return static_cast<Size>(qkern::cpu::scratch_peak(reset)); },
      "Most scratch that one thread has asked for since the last reset, in bytes.");
}
