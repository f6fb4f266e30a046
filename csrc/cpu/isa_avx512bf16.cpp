// AVX-512 with VNNI, VBMI and AVX512-BF16: dot products for many rows of bfloat16, all else as in
// isa_avx512vnni.cpp. For the same reasons as there, all here has internal linkage.
#include "simd_avx512.h"

#include "kernels.h"

#include "dot_avx512.h"
#include "kernels_bf16.h"
#include "kernels_dot.h"
#include "probe.h"

namespace qkern::cpu {
namespace {

template <typename Engine>
void run_probe(const void* x, const void* panel, float* c) {
  using Element = typename Engine::Element;
  static const Engine engine;
  engine.run_strip(static_cast<const Element*>(x), Engine::kRowStride, Engine::kStripRows,
                   static_cast<const Element*>(panel), kProbeDepth, c, false);
}

template <typename Engine>
constexpr bool kFitsProbe =
    Engine::kStripRows * Engine::kRowStride * sizeof(typename Engine::Element) <= kProbeXBytes &&
    kProbeDepth * kTileCols * sizeof(typename Engine::Element) <= kProbePanelBytes &&
    Engine::kStripRows * kTileCols <= kProbeSums;
static_assert(kFitsProbe<FloatEngine> && kFitsProbe<BFloat16Engine>);

}  // namespace

const KernelTable& kernels_avx512bf16() {
  static const KernelTable table = [] {
    KernelTable found = kernels_avx512vnni();
    constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);
    found.name = "avx512bf16";
    found.linear_4bit[kBFloat16] = linear_4bit_dot<BFloat16Engine, BFloat16>;
    found.linear_4bit_dx[kBFloat16] = linear_4bit_dx<BFloat16Engine, BFloat16>;
    return found;
  }();
  return table;
}

ProbeStrips probe_strips() { return {run_probe<FloatEngine>, run_probe<BFloat16Engine>}; }

}  // namespace qkern::cpu
