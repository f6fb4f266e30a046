#pragma once

#include <cstdint>

#include "cuda_emulator/async_proxy.h"
#include "cuda_emulator/scheduler.h"

// Wide accesses, cp.async and ldmatrix. They are inline, so that the accesses themselves are
// compiled with the kernels and the sanitizers see them.
namespace qkern::cuda::emulator {

inline void require_aligned(const void* p, std::size_t alignment, const Site& site) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0) fail(site, "misaligned address");
}

template <typename T>
T load(const void* p, const Site& site) {
  require_aligned(p, sizeof(T), site);
  return *static_cast<const T*>(p);
}

template <typename T>
void store(void* p, const T& value, const Site& site) {
  require_aligned(p, sizeof(T), site);
  *static_cast<T*>(p) = value;
}

inline void copy16(const Copy& copy) {
  *static_cast<uint4*>(copy.shared) =
      copy.global == nullptr ? uint4{} : *static_cast<const uint4*>(copy.global);
  note_shared_write(copy.shared);
}

// A null `global` writes zeros.
inline void cp_async16(void* shared, const void* global, const Site& site) {
  require_aligned(shared, sizeof(uint4), site);
  require_aligned(global, sizeof(uint4), site);
  if (!is_shared(shared, sizeof(uint4))) fail(site, "the destination is outside shared memory");
  if (is_shared(global, 1)) fail(site, "the source is in shared memory");
  const Copy copy{shared, global};
  // Before sm_80 it is an ordinary load and store.
  if (settings().cp_async == CpAsync::kEarly || capability() < 80) {
    copy16(copy);
    return;
  }
  constexpr unsigned kPoison = 0x01010101u * kPoisonByte;
  *static_cast<uint4*>(shared) = {kPoison, kPoison, kPoison, kPoison};
  queue_copy(copy);
}

inline void wait_copies(std::size_t pending) {
  for (Copy copy; pop_copy(pending, copy);) copy16(copy);
}

// A kernel's end completes its copies, waited for or not.
inline void finish_copies() {
  commit_copies();
  wait_copies(0);
}

// ldmatrix (PTX ISA): lanes 8i..8i+7 give the addresses of the rows of matrix i, 8 x 8 of 16 bits.
// Lane l gets elements 2(l % 4) and the next (low half first) of row l / 4; transposed, of column
// l / 4. Every lane passes an address that is 16-aligned and in shared memory.
struct LdmatrixLane {
  uint4 row;
  unsigned result[4];
};

void combine_ldmatrix(void* const* lanes, unsigned mask);
void combine_ldmatrix_trans(void* const* lanes, unsigned mask);

template <int kMatrices>
void ldmatrix(std::uint32_t (&result)[kMatrices], const void* row, bool trans, const Site& site) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  LdmatrixLane lane{};
  if (threadIdx.x % kWarpSize < 8 * kMatrices) {
    require_aligned(row, sizeof(uint4), site);
    if (!is_shared(row, sizeof(uint4))) fail(site, "the row is outside shared memory");
    lane.row = *static_cast<const uint4*>(row);
  }
  const Combine combine = trans ? combine_ldmatrix_trans : combine_ldmatrix;
  meet(kFullMask, site, {combine, false, true}, &lane);
  for (int i = 0; i < kMatrices; ++i) result[i] = lane.result[i];
}

// Runs body() in every thread; see scheduler.h. A stream is noted: work is done at once on any.
template <typename Body>
const char* launch(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, const Body& body,
                   void* stream = nullptr) {
  Launches& noted = launches();
  ++noted.count;
  noted.device = noted.current_device;
  noted.stream = stream;
  if (!noted.computed) return nullptr;
  return run(
      grid, block, dynamic_shared_bytes,
      [](const void* context) {
        (*static_cast<const Body*>(context))();
        finish_copies();
      },
      &body);
}

}  // namespace qkern::cuda::emulator
