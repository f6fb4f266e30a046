#pragma once

#include <cstdint>

#include "cuda_emulator/scheduler.h"

// mma.sync with a 16 x k matrix a, a k x 8 matrix b, k 8 or 16, and a float32 16 x 8 matrix d:
// d += a b. What each lane holds of them is PTX's m16n8k8 and m16n8k16 (.row.col). With g = lane /
// 4 and t = lane % 4,
//   a[i]: row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next, the low half first;
//   b[i]: column g, rows 2t + 8 i and the next;
//   d[i]: row g + 8 (i / 2), column 2t + i % 2.
//
// Products are exact; they are added to d one by one for ascending k, each sum rounded to float32.
// A device adds groups of them at once, in an order and with a truncation that PTX leaves open.
namespace qkern::cuda::emulator {

enum class MmaType { kFloat16, kBFloat16 };

struct MmaLane {
  const std::uint32_t* a;  // [k / 4]
  const std::uint32_t* b;  // [k / 8]
  float* d;                // [4]
};

void combine_mma_f16_k8(void* const* lanes, unsigned mask);
void combine_mma_f16_k16(void* const* lanes, unsigned mask);
void combine_mma_bf16_k8(void* const* lanes, unsigned mask);
void combine_mma_bf16_k16(void* const* lanes, unsigned mask);

template <int kK>
void mma(MmaType type, float (&d)[4], const std::uint32_t (&a)[kK / 4],
         const std::uint32_t (&b)[kK / 8], const Site& site) {
  static_assert(kK == 8 || kK == 16);
  if (type == MmaType::kBFloat16 && capability() < 80) fail(site, "bfloat16 needs sm_80");
  if (kK == 16 && capability() < 80) fail(site, "m16n8k16 needs sm_80");
  const Combine f16 = kK == 8 ? combine_mma_f16_k8 : combine_mma_f16_k16;
  const Combine bf16 = kK == 8 ? combine_mma_bf16_k8 : combine_mma_bf16_k16;
  MmaLane lane{a, b, d};
  meet(kFullMask, site, {type == MmaType::kFloat16 ? f16 : bf16, false, true}, &lane);
}

}  // namespace qkern::cuda::emulator
