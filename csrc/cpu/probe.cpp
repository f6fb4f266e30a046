#include "probe.h"

#include <algorithm>
#include <chrono>
#include <limits>

namespace qkern::cpu {
namespace {

constexpr int kRounds = 40;
constexpr int kRunsARound = 4;  // some microseconds: the clock's own resolution is a hundredth

struct alignas(64) Operands {
  float x[kProbeXBytes / sizeof(float)];
  float panel[kProbePanelBytes / sizeof(float)];
  float sums[kProbeSums];
};

double seconds(ProbeStrips::Fn multiply, Operands& at) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < kRunsARound; ++i) multiply(at.x, at.panel, at.sums);
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

double measure_bfloat16_rate(const ProbeStrips& strips) {
  Operands operands = {};
  double float32 = std::numeric_limits<double>::infinity(), bfloat16 = float32;
  for (int i = 0; i < kRounds; ++i) {
    float32 = std::min(float32, seconds(strips.float32, operands));
    bfloat16 = std::min(bfloat16, seconds(strips.bfloat16, operands));
  }
  return float32 / bfloat16;
}

}  // namespace qkern::cpu
