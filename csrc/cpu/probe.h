// Whether bfloat16 dot products pay: processors with AVX512-BF16 differ. On Zen 4 and 5 they do
// twice the multiply-adds of float32's instructions in the same time, on Sapphire Rapids half.
#pragma once

#include <cstdint>

namespace qkern::cpu {

// A strip of the tiled matmuls, by each engine on the same memory, in the first-level cache.
inline constexpr std::int64_t kProbeDepth = 128;
inline constexpr std::int64_t kProbeXBytes = 16 * 1024;
inline constexpr std::int64_t kProbePanelBytes = 16 * 1024;
inline constexpr std::int64_t kProbeSums = 14 * 32;

struct ProbeStrips {
  using Fn = void (*)(const void* x, const void* panel, float* c);
  Fn float32, bfloat16;
};

// Of isa_avx512bf16.cpp.
ProbeStrips probe_strips();

// The rate of bfloat16 dot products over that of float32, timed: the shortest of many short runs of
// each, in turn, so that neither another process nor a changing clock rate makes the difference.
// Takes a fraction of a millisecond.
double measure_bfloat16_rate(const ProbeStrips& strips);

// What a rate decides. The products are not all of a matmul, and those of float32 round no weights.
inline constexpr double kLeastRate = 1.25;
inline bool bfloat16_pays(double rate) { return rate >= kLeastRate; }

}  // namespace qkern::cpu
