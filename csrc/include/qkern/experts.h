// How the fields of several weights of one shape lie in memory: those of each whole, one after the
// other.
#pragma once

#include <cstdint>

#include "qkern/codes.h"
#include "qkern/ops.h"

namespace qkern {

// From a field of a weight to that of the next; nested offsets are neighbours.
struct ExpertStride {
  std::int64_t packed;         // bytes
  std::int64_t absmax;         // bytes
  std::int64_t nested_absmax;  // elements
};

inline ExpertStride expert_stride(const Weight4bit& weight) {
  const std::int64_t numel = weight.rows * weight.cols;
  const std::int64_t blocks = (numel + weight.block_size - 1) / weight.block_size;
  return {(numel + 1) / 2, blocks * (weight.nested_absmax == nullptr ? 4 : 1),
          (blocks + kNestedBlockSize - 1) / kNestedBlockSize};
}

}  // namespace qkern
