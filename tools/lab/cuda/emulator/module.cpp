// The Python module _cuda_emulated: the cuda_* functions of qkern._C with the emulator behind them,
// on CPU memory, and what chooses the schedule.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda.h"
#include "cuda_emulator/scheduler.h"

namespace {

namespace emulator = qkern::cuda::emulator;

void set_schedule(const std::string& order, std::uint64_t seed, bool late_copies, int capability) {
  emulator::Settings settings;
  if (order == "reverse") {
    settings.order = emulator::Order::kReverse;
  } else if (order == "random") {
    settings.order = emulator::Order::kRandom;
  } else if (order != "forward") {
    throw pybind11::value_error("order: got " + order + "; takes forward, reverse or random");
  }
  settings.seed = seed;
  settings.cp_async = late_copies ? emulator::CpAsync::kLate : emulator::CpAsync::kEarly;
  settings.capability = capability;
  emulator::settings() = settings;
}

}  // namespace

PYBIND11_MODULE(_cuda_emulated, m) {
  m.doc() = "qkern's CUDA kernels on a CPU; see README.md.";
  qkern::binding::bind_cuda(m);
  m.def(
      "set_schedule", set_schedule,
      "order (forward, reverse, random), seed, late_copies (of cp.async), capability (75, 80...)");
}
