#pragma once

#include "cuda_emulator.h"
#include "cuda_emulator/mma.h"
#include "qkern/dtype.h"

// The emulator's bodies of csrc/cuda/ptx.h.
namespace qkern::cuda {

inline uint4 load_global16(const void* p, QKERN_EMULATOR_SITE) {
  return emulator::load<uint4>(p, {"load_global16", file, line});
}

inline void store_global16(void* p, uint4 value, QKERN_EMULATOR_SITE) {
  emulator::store(p, value, {"store_global16", file, line});
}

template <int kWords>
using Words =
    std::conditional_t<kWords == 4, uint4, std::conditional_t<kWords == 2, uint2, unsigned>>;

template <int kWords>
void load_words(const void* p, std::uint32_t (&words)[kWords], QKERN_EMULATOR_SITE) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  const auto found = emulator::load<Words<kWords>>(p, {"load_words", file, line});
  std::memcpy(words, &found, sizeof words);
}

template <int kWords>
void store_words(void* p, const std::uint32_t (&words)[kWords], QKERN_EMULATOR_SITE) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  Words<kWords> value;
  std::memcpy(&value, words, sizeof words);
  emulator::store(p, value, {"store_words", file, line});
}

inline unsigned warp_max(unsigned value, QKERN_EMULATOR_SITE) {
  for (int step = 1; step < emulator::kWarpSize; step *= 2) {
    const unsigned other =
        __shfl_xor_sync(emulator::kFullMask, value, step, emulator::kWarpSize, file, line);
    value = other > value ? other : value;
  }
  return value;
}

inline unsigned warp_sum(unsigned value, QKERN_EMULATOR_SITE) {
  for (int step = 1; step < emulator::kWarpSize; step *= 2) {
    value += __shfl_xor_sync(emulator::kFullMask, value, step, emulator::kWarpSize, file, line);
  }
  return value;
}

inline const float* address_of(const float* base, unsigned index) { return base + index; }

inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 15u;
    std::uint32_t byte = bytes >> (8 * (nibble & 7)) & 0xffu;
    if (nibble > 7) byte = (byte & 0x80u) != 0 ? 0xffu : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline void cp_async16(void* shared, const void* source, bool valid, QKERN_EMULATOR_SITE) {
  emulator::cp_async16(shared, valid ? source : nullptr, {"cp_async16", file, line});
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int kPending>
void cp_async_wait() {
  emulator::wait_copies(kPending);
}

inline void load_matrices(const void* row, std::uint32_t (&out)[4], QKERN_EMULATOR_SITE) {
  emulator::ldmatrix(out, row, false, {"load_matrices", file, line});
}

inline void load_matrices_transposed(const void* row, std::uint32_t (&out)[4],
                                     QKERN_EMULATOR_SITE) {
  emulator::ldmatrix(out, row, true, {"load_matrices_transposed", file, line});
}

template <typename T>
void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                 QKERN_EMULATOR_SITE) {
  static_assert(std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>);
  constexpr auto kType =
      std::is_same_v<T, Float16> ? emulator::MmaType::kFloat16 : emulator::MmaType::kBFloat16;
  const emulator::Site site{"mma_16x8x16", file, line};
  if (emulator::capability() >= 80) {
    emulator::mma<16>(kType, d, a, b, site);
    return;
  }
  emulator::mma<8>(kType, d, {a[0], a[1]}, {b[0]}, site);
  emulator::mma<8>(kType, d, {a[2], a[3]}, {b[1]}, site);
}

}  // namespace qkern::cuda
