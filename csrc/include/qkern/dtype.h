#pragma once

#include <cstdint>

namespace qkern {

// Numbers are part of the binding's contract (qkern/backends/_args.py).
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Storage types: the bits alone, so that no compiler support for 16-bit floats is needed.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2, "tensors hold them densely");

}  // namespace qkern
