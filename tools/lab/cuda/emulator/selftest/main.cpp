// The emulator's own tests: small kernels that are right, and ones with one mistake each.
//
//   emulator_selftest NAME ORDER SEED CP_ASYNC CAPABILITY
//
// runs one and prints "ok", "wrong: ..." (it ran, with a wrong result) or "failed: ..." (the
// emulator's message). tests/cuda/test_emulator.py knows what each must print, and when.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "selftest.h"

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fputs("usage: emulator_selftest NAME ORDER SEED CP_ASYNC CAPABILITY\n", stderr);
    return 2;
  }
  const std::map<std::string, selftest::emulator::Order> orders = {
      {"forward", selftest::emulator::Order::kForward},
      {"reverse", selftest::emulator::Order::kReverse},
      {"random", selftest::emulator::Order::kRandom}};
  selftest::emulator::Settings& settings = selftest::emulator::settings();
  settings.order = orders.at(argv[2]);
  settings.seed = std::strtoull(argv[3], nullptr, 10);
  settings.cp_async = std::string(argv[4]) == "early" ? selftest::emulator::CpAsync::kEarly
                                                      : selftest::emulator::CpAsync::kLate;
  settings.capability = std::atoi(argv[5]);
  selftest::Tests tests;
  for (const auto& some : {selftest::arithmetic(), selftest::barriers(), selftest::bounds(),
                           selftest::copies(), selftest::warpgroups(), selftest::warps()}) {
    tests.insert(some.begin(), some.end());
  }
  std::puts(tests.at(argv[1])().c_str());
  return 0;
}
