// What the last lane of a meeting does for all: shuffles, votes, ldmatrix and mma. Compiled without
// ThreadSanitizer's instrumentation, for it reads and writes other lanes' registers.
#include <cstdint>
#include <cstring>

#include "cuda_emulator/float16.h"
#include "cuda_emulator/intrinsics.h"
#include "cuda_emulator/memory.h"
#include "cuda_emulator/mma.h"

namespace qkern::cuda::emulator {
namespace {

template <typename Lane>
Lane& lane_of(void* const* lanes, int lane) {
  return *static_cast<Lane*>(lanes[lane]);
}

void ldmatrix(void* const* lanes, bool trans) {
  std::uint16_t matrix[4][8][8];
  for (int l = 0; l < kWarpSize; ++l) {
    std::memcpy(matrix[l / 8][l % 8], &lane_of<LdmatrixLane>(lanes, l).row, sizeof(uint4));
  }
  for (int l = 0; l < kWarpSize; ++l) {
    for (int m = 0; m < 4; ++m) {
      const int major = l / 4;
      const int minor = l % 4 * 2;
      const std::uint32_t low = trans ? matrix[m][minor][major] : matrix[m][major][minor];
      const std::uint32_t high = trans ? matrix[m][minor + 1][major] : matrix[m][major][minor + 1];
      lane_of<LdmatrixLane>(lanes, l).result[m] = low | high << 16;
    }
  }
}

template <MmaType kType>
float element(std::uint32_t pair, int half) {
  const auto bits = static_cast<std::uint16_t>(pair >> (16 * half));
  return kType == MmaType::kFloat16 ? __half2float({bits}) : __bfloat162float({bits});
}

template <MmaType kType, int kK>
void mma(void* const* lanes) {
  float a[16][kK];
  float b[kK][8];
  float d[16][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const MmaLane& lane = lane_of<MmaLane>(lanes, l);
    const int group = l / 4;
    const int pair = l % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kK / 4; ++i) {
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = element<kType>(lane.a[i], half);
      }
      for (int i = 0; i < kK / 8; ++i)
        b[pair + i * 8 + half][group] = element<kType>(lane.b[i], half);
    }
    for (int i = 0; i < 4; ++i) d[group + i / 2 * 8][pair + i % 2] = lane.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kK; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int l = 0; l < kWarpSize; ++l) {
    for (int i = 0; i < 4; ++i) {
      lane_of<MmaLane>(lanes, l).d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }
  }
}

}  // namespace

void combine_shuffle(void* const* lanes, unsigned mask) {
  for (int l = 0; l < kWarpSize; ++l) {
    if ((mask >> l & 1) == 0) continue;
    auto& lane = lane_of<ShuffleLane>(lanes, l);
    lane.outside_mask = (mask >> lane.source & 1) == 0;
    if (lane.outside_mask) continue;
    std::memcpy(lane.result, lane_of<ShuffleLane>(lanes, lane.source).value, sizeof lane.result);
  }
}

void combine_vote(void* const* lanes, unsigned mask) {
  std::uint32_t ballot = 0;
  for (int l = 0; l < kWarpSize; ++l) {
    if ((mask >> l & 1) != 0 && lane_of<VoteLane>(lanes, l).predicate) ballot |= 1u << l;
  }
  for (int l = 0; l < kWarpSize; ++l) {
    if ((mask >> l & 1) != 0) lane_of<VoteLane>(lanes, l).ballot = ballot;
  }
}

void combine_ldmatrix(void* const* lanes, unsigned) { ldmatrix(lanes, false); }
void combine_ldmatrix_trans(void* const* lanes, unsigned) { ldmatrix(lanes, true); }

void combine_mma_f16_k8(void* const* lanes, unsigned) { mma<MmaType::kFloat16, 8>(lanes); }
void combine_mma_f16_k16(void* const* lanes, unsigned) { mma<MmaType::kFloat16, 16>(lanes); }
void combine_mma_bf16_k8(void* const* lanes, unsigned) { mma<MmaType::kBFloat16, 8>(lanes); }
void combine_mma_bf16_k16(void* const* lanes, unsigned) { mma<MmaType::kBFloat16, 16>(lanes); }

}  // namespace qkern::cuda::emulator
