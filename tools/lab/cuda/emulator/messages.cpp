#include "messages.h"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace qkern::cuda::emulator {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxGridYZ = 65535;
constexpr unsigned kMaxGridX = 0x7fffffff;

// Most dynamic shared memory a block can opt in to (CUDA C++ Programming Guide, compute
// capabilities).
std::size_t max_dynamic_shared(int capability) {
  switch (capability) {
    case 75:
      return 64 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 90:
    case 100:
    case 103:
      return 227 << 10;
    default:
      return 99 << 10;
  }
}

}  // namespace

std::string text(const char* format, ...) {
  char buffer[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string where(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return text("%s at %s:%d", site.operation, slash == nullptr ? site.file : slash + 1, site.line);
}

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.operation, b.operation) == 0 &&
         std::strcmp(a.file, b.file) == 0;
}

std::string launch_error(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    return text("block of %u x %u x %u threads; a device takes 1 to 1024", block.x, block.y,
                block.z);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ) {
    return text("grid of %u x %u x %u blocks; a device takes 1 to 2147483647 x 65535 x 65535",
                grid.x, grid.y, grid.z);
  }
  if (const std::size_t most = max_dynamic_shared(capability()); dynamic_shared_bytes > most) {
    return text("%zu bytes of dynamic shared memory; sm_%d has %zu", dynamic_shared_bytes,
                capability(), most);
  }
  return {};
}

}  // namespace qkern::cuda::emulator
