// Whether memory is there, or the system makes it when it is first written.
#pragma once

#include <cstddef>

namespace qkern::cpu {

// Whether the pages of `bytes` from `address` on exist. Looks at a few of them. Says yes where the
// system does not tell. `bytes` are many pages.
bool has_pages(const void* address, std::size_t bytes);

// Asks the system for large pages from `address` on, of which all bytes are about to be written:
// where there are none yet, making them a few KiB at a time takes longer than writing. What was
// written stays, and a system that has no large pages gives small ones.
void ask_for_large_pages(void* address, std::size_t bytes);

}  // namespace qkern::cpu
