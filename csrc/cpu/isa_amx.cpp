// AVX-512 with VNNI, AVX512-BF16 and AMX: tiles for 16-bit dtypes, all else as in
// isa_avx512vnni.cpp.
// For the same reasons as there, all here has internal linkage.
#include "simd_avx512.h"

#include "kernels.h"

#include "dot_avx512.h"
#include "kernels_amx.h"
#include "kernels_dot.h"

namespace qkern::cpu {

const KernelTable& kernels_amx() {
  static const KernelTable table = [] {
    KernelTable found = kernels_avx512vnni();
    constexpr int kBFloat16 = static_cast<int>(DType::kBFloat16);
    constexpr int kFloat16 = static_cast<int>(DType::kFloat16);
    found.name = "amx";
    found.linear_4bit[kBFloat16] = linear_4bit_dot<AmxEngine, BFloat16>;
    found.linear_4bit_dx[kBFloat16] = linear_4bit_dx<AmxEngine, BFloat16>;
    found.linear_4bit[kFloat16] = linear_4bit_dot<SplitAmxEngine, Float16>;
    found.linear_4bit_dx[kFloat16] = linear_4bit_dx<SplitAmxEngine, Float16>;
    return found;
  }();
  return table;
}

}  // namespace qkern::cpu
