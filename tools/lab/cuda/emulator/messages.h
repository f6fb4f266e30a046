#pragma once

#include <cstddef>
#include <string>

#include "cuda_emulator/scheduler.h"

// What is said of a kernel's mistakes.
namespace qkern::cuda::emulator {

// printf's result, of at most 255 characters.
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// "operation at file:line".
std::string where(const Site& site);
bool same_site(const Site& a, const Site& b);

// Why no device takes a launch, or nothing.
std::string launch_error(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes);

}  // namespace qkern::cuda::emulator
