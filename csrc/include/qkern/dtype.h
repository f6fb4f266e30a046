#pragma once

#include <cstdint>

namespace qkern {

// Storage types: the bits alone, so that no compiler support for 16-bit floats is needed.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2, "tensors hold them densely");

}  // namespace qkern
