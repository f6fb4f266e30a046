// The Python module qkern._C: integers in (see arguments.h), kernels called, errors out.
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/dispatch.h"
#include "../cpu/parallel.h"
#include "../cpu/probe.h"
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

std::string names_of(const py::list& names) {
  return py::str(", ").attr("join")(names).cast<std::string>();
}

std::string isa() {
  const ContextIsa of_context;
  const qkern::cpu::KernelTable* table = qkern::cpu::active_kernels();
  if (table == nullptr) throw py::value_error(qkern::cpu::unknown_isa());
  return table->name;
}

bool multiplies_bfloat16() {
  const ContextIsa of_context;
  return qkern::cpu::multiplies_bfloat16();
}

void set_isa(const std::string& name) {
  if (!qkern::cpu::set_isa(name.c_str()).ok()) {
    throw py::value_error("isa: got '" + name + "'; takes one of " + names_of(available_isas()));
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = QKERN_VERSION;
  info["compiler"] = QKERN_COMPILER;
  info["cxx_flags"] = QKERN_CXX_FLAGS;
  info["threads"] = qkern::cpu::parallel_runtime();
  info["cuda"] = QKERN_CUDA_BUILD;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "qkern's native kernels, on pointers and sizes. Use the functions of qkern instead.";
  m.attr("version") = QKERN_VERSION;
  isa_variable = PyContextVar_New("qkern_isa", Py_None);
  if (isa_variable == nullptr) throw py::error_already_set();
  add_ops(m, "", kCpuOps);
  bind_tensors(m);
#ifdef QKERN_HAVE_CUDA
  bind_cuda(m);
#endif
  m.def("isa", isa, "Name of the instruction set in force.");
  m.def("available_isas", available_isas, "Names of those that this processor runs, worst first.");
  m.def(
      "multiplies_bfloat16", multiplies_bfloat16,
      "Whether the processor multiplies bfloat16, by instructions not wider than those in force.");
  m.def("bfloat16_rate", qkern::cpu::bfloat16_rate,
        "Rate of bfloat16 dot products over float32's, as the first call measured it; 0 where the "
        "choice of an instruction set did not depend on it.");
  m.def("bfloat16_pays", qkern::cpu::bfloat16_pays, "Whether that rate selects avx512bf16.");
  m.def("set_isa", set_isa, "Force an instruction set in the process; '' ends that.");
  m.attr("isa_variable") = py::handle(isa_variable);
  m.def("build_info", build_info);
  m.def("share_always", qkern::cpu::share_always,
        "Share calls among threads even where these come late, as tests of threads want.");
  m.def(
      "scratch_bytes",
      [](bool reset) { return static_cast<Size>(qkern::cpu::scratch_peak(reset)); },
      "Most scratch that one thread has asked for since the last reset, in bytes.");
}
