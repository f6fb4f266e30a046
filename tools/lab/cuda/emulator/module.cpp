// The Python module _cuda_emulated: the cuda_* functions of qkern._C with the emulator behind them,
// on CPU memory, and what chooses the schedule.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda.h"
#include "cuda_emulator/scheduler.h"
#include "plain_tensor.h"

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

// How many launches there were since the last call, then the device that was the current one and
// the stream at the latest of them.
pybind11::tuple launches() {
  const emulator::Launches found = emulator::launches();
  emulator::launches().count = 0;
  return pybind11::make_tuple(found.count, found.device,
                              reinterpret_cast<std::uintptr_t>(found.stream));
}

}  // namespace

PYBIND11_MODULE(_cuda_emulated, m) {
  m.doc() = "qkern's CUDA kernels on a CPU; see README.md.";
  qkern::binding::bind_cuda(m);
  m.def("set_schedule", set_schedule,
        "order (forward, reverse, random), seed, late_copies (of cp.async, and products of "
        "warpgroups), capability (75, 80...)");
  m.def("read_tensors_with", qkern::binding::read_tensors_with);
  m.def("launches", launches, "(number since the last call, current device, stream)");
  m.def("current_device", [] { return emulator::launches().current_device; });
  m.def(
      "set_computed", [](bool computed) { emulator::launches().computed = computed; },
      "Whether launches compute, or are only counted, to time what comes before them.");
}
