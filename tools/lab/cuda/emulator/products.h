#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "shared_memory.h"

// What the scheduler tells those who keep account of products of warpgroups.
namespace qkern::cuda::emulator {

// A block starts, with this dynamic shared memory.
void start_async_proxy(const SharedVariable& dynamic_shared);
std::uint32_t dynamic_shared_address();  // of its first byte
// Whether the 16 bytes at an offset are in it, and whether products see what was written there.
bool in_dynamic_shared(std::uint32_t offset);
bool visible_to_products(std::uint32_t offset);

void start_products(unsigned num_threads);
// All threads have left: what is wrong with the products they started, or nothing.
std::string end_products();

}  // namespace qkern::cuda::emulator
