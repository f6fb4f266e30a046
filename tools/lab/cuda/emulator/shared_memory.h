#pragma once

#include <cstddef>
#include <utility>

namespace qkern::cuda::emulator {

// Memory of its own for every variable, so that AddressSanitizer knows where it ends.
struct SharedVariable {
  const void* key;
  std::size_t size;
  unsigned char* data;

  SharedVariable(const void* key_, std::size_t size_);
  SharedVariable(SharedVariable&& other) noexcept
      : key(other.key), size(other.size), data(std::exchange(other.data, nullptr)) {}
  SharedVariable& operator=(SharedVariable&&) = delete;
  ~SharedVariable();
  bool holds(const void* begin, std::size_t bytes) const {
    const auto* p = static_cast<const unsigned char*>(begin);
    return p >= data && p + bytes <= data + size;
  }
};

}  // namespace qkern::cuda::emulator
