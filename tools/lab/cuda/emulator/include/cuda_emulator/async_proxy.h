#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_emulator/scheduler.h"

// Dynamic shared memory as products of warpgroups see it: by addresses of 18 bits, and by the async
// proxy, another way than that of the threads' own accesses.
namespace qkern::cuda::emulator {

// The block's dynamic shared memory for a kernel that declares it aligned to 1024 bytes.
unsigned char* dynamic_shared_1024();

// The address of `p`, which points into dynamic shared memory. Its first byte has 1024 where the
// kernel declared that alignment, and otherwise one that is only 16-aligned.
std::uint32_t shared_address(const void* p, const Site& site);

// The running thread has written 16 bytes at `p`. Until it calls fence_async_proxy, products do not
// see them.
void note_shared_write(const void* p);
void fence_async_proxy(const Site& site);

// Fails where the device has no products of warpgroups.
void require_hopper(const Site& site);

}  // namespace qkern::cuda::emulator
