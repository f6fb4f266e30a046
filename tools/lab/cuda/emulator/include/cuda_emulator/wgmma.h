#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_emulator/async_proxy.h"
#include "cuda_emulator/mma.h"
#include "cuda_emulator/scheduler.h"

// wgmma.mma_async with a in registers: d += a b for a 64 x 16 matrix a, a 16 x N matrix b in
// dynamic shared memory and a float32 d. What each lane holds of a and d is in
// csrc/cuda/ptx_hopper.h. Each warp of a warpgroup computes its 16 rows when its own lanes have
// met, with mma.h's arithmetic; that the four make the same calls is found out by comparing them.
//
// A product is done at its call or, late (see CpAsync), by the wait that asks for its group. Then
// it reads a and b when it is done, and d holds NaNs until then.
namespace qkern::cuda::emulator {

// b as its descriptor tells (PTX ISA, "Matrix Descriptor Format"), with 128-byte swizzling.
// Granules are its pieces of 16 bytes: eight rows of a column, or transposed eight columns of a
// row.
struct ProductOperand {
  MmaType type;
  bool transposed;
  int columns;
  std::uint32_t start, leading, stride;
  std::uint32_t shared;  // address of dynamic shared memory

  int granules() const { return 2 * columns; }
  // Where granule i lies in dynamic shared memory: i / 2 is its column, or transposed
  // i / (columns / 8) its row.
  std::uint32_t offset(int i) const {
    const auto granule = static_cast<std::uint32_t>(i);
    std::uint32_t address = start;
    if (transposed) {
      const auto chunks = static_cast<std::uint32_t>(columns) / 8;
      const std::uint32_t row = granule / chunks;
      const std::uint32_t chunk = granule % chunks;
      address += chunk / 8 * leading + chunk % 8 * 16 + row / 8 * stride + row % 8 * 128;
    } else {
      const std::uint32_t column = granule / 2;
      address += column / 8 * stride + column % 8 * 128 + granule % 2 * 16;
    }
    return (address ^ (address >> 3 & 0x70u)) - shared;
  }
};

// Fails where the descriptor is none that this emulator knows, or where b is not in dynamic shared
// memory. Of the granules a lane looks at its own: from the lane's number on, every 32nd.
ProductOperand product_operand(MmaType type, bool transposed, int columns, std::uint64_t descriptor,
                               const Site& site);
// Fails where products do not see what was written to the running lane's granules.
void require_visible(const ProductOperand& b, const Site& site);

// Fails unless a's four words are as the running thread's last wgmma_fence of them found them.
void require_fenced(const std::uint32_t* a, const Site& site);
void note_fenced(const std::uint32_t* words, std::size_t count);

// Fails where the block is not made of warpgroups, or the device has no products of them.
void require_warpgroups(const Site& site);

// The running lane's part of reading b, for the sanitizers; see memory.h.
inline void read_operand(const ProductOperand& b) {
  const unsigned char* shared = dynamic_shared();
  for (int i = static_cast<int>(threadIdx.x % kWarpSize); i < b.granules(); i += kWarpSize) {
    const uint4 value = *reinterpret_cast<const uint4*>(shared + b.offset(i));
    asm volatile("" ::"m"(value));
  }
}

struct ProductLane {
  Site site;
  std::uint64_t descriptor;
  const ProductOperand* b;
  const std::uint32_t* a;  // [4]
  float* d;                // [columns / 2]
};
void combine_product(void* const* lanes, unsigned mask);

template <int kValues>
void product(MmaType type, bool transposed, float (&d)[kValues], const std::uint32_t (&a)[4],
             std::uint64_t descriptor, const Site& site) {
  static_assert(kValues == 64 || kValues == 128);
  require_warpgroups(site);
  require_fenced(a, site);
  const ProductOperand b = product_operand(type, transposed, 2 * kValues, descriptor, site);
  read_operand(b);  // first, so that ThreadSanitizer names both accesses where a barrier is missing
  require_visible(b, site);
  ProductLane lane{site, descriptor, &b, a, d};
  meet(kFullMask, site, {combine_product, false, true}, &lane);
}

// The other calls, of which the four warps must make the same as well.
struct ProductCallLane {
  Site site;
  std::size_t pending;
};
void combine_product_fence(void* const* lanes, unsigned mask);
void combine_product_commit(void* const* lanes, unsigned mask);
void combine_product_wait(void* const* lanes, unsigned mask);

inline void product_fence(const std::uint32_t* words, std::size_t count, const Site& site) {
  require_warpgroups(site);
  note_fenced(words, count);
  ProductCallLane lane{site, 0};
  meet(kFullMask, site, {combine_product_fence, false, true}, &lane);
}

inline void product_commit(const Site& site) {
  require_warpgroups(site);
  ProductCallLane lane{site, 0};
  meet(kFullMask, site, {combine_product_commit, false, true}, &lane);
}

// b of the i-th product of the running thread's warp that a wait for all groups but the `pending`
// youngest will do; false: there are not so many.
bool awaited_product(std::size_t pending, std::size_t i, ProductOperand& b);

inline void product_wait(std::size_t pending, const Site& site) {
  require_warpgroups(site);
  ProductOperand b;
  for (std::size_t i = 0; awaited_product(pending, i, b); ++i) read_operand(b);
  ProductCallLane lane{site, pending};
  meet(kFullMask, site, {combine_product_wait, false, true}, &lane);
}

}  // namespace qkern::cuda::emulator
