#pragma once

#include "cuda_emulator/wgmma.h"
#include "cuda_emulator_ptx.h"

// The emulator's bodies of csrc/cuda/ptx_hopper.h.
namespace qkern::cuda {

inline std::uint32_t shared_address(const void* shared, QKERN_EMULATOR_SITE) {
  return emulator::shared_address(shared, {"shared_address", file, line});
}

inline void store_shared16(void* p, uint4 value, QKERN_EMULATOR_SITE) {
  const emulator::Site site{"store_shared16", file, line};
  if (!emulator::is_shared(p, sizeof value)) emulator::fail(site, "outside shared memory");
  emulator::store(p, value, site);
  emulator::note_shared_write(p);
}

inline void fence_async_proxy(QKERN_EMULATOR_SITE) {
  emulator::fence_async_proxy({"fence_async_proxy", file, line});
}

template <int kValues>
void keep(float (&)[kValues]) {}

template <int kSteps>
void wgmma_fence(std::uint32_t (&a)[kSteps][4], QKERN_EMULATOR_SITE) {
  emulator::product_fence(a[0], kSteps * 4, {"wgmma_fence", file, line});
}

inline void wgmma_commit(QKERN_EMULATOR_SITE) {
  emulator::product_commit({"wgmma_commit", file, line});
}

template <int kPending>
void wgmma_wait(QKERN_EMULATOR_SITE) {
  emulator::product_wait(kPending, {"wgmma_wait", file, line});
}

template <typename T, bool kTransposed, int kValues>
void wgmma_64xNx16(float (&d)[kValues], const std::uint32_t (&a)[4], std::uint64_t b,
                   QKERN_EMULATOR_SITE) {
  static_assert(std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>);
  constexpr auto kType =
      std::is_same_v<T, Float16> ? emulator::MmaType::kFloat16 : emulator::MmaType::kBFloat16;
  emulator::product(kType, kTransposed, d, a, b, {"wgmma_64xNx16", file, line});
}

}  // namespace qkern::cuda
