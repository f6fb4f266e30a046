#pragma once

#include <cstddef>

namespace qkern::cpu {

// No kernel asks for more than this, whatever the sizes of its operands.
inline constexpr std::size_t kScratchLimit = std::size_t{1} << 20;

// This thread's scratch of at least `bytes`, 64-byte aligned, kept for the next call (fresh pages
// cost as much as the arithmetic of a small matmul). nullptr when out of memory or over the limit.
void* thread_scratch(std::size_t bytes);

// The largest scratch that any thread has asked for since the last reset.
std::size_t scratch_peak(bool reset);

}  // namespace qkern::cpu
