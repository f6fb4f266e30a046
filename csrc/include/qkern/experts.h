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

// Where the rows of an expert end, whose offsets the host can read.
inline std::int64_t end_of(const GroupOffsets& groups, std::int64_t expert) {
  return groups.wide ? static_cast<const std::int64_t*>(groups.offsets)[expert]
                     : static_cast<const std::int32_t*>(groups.offsets)[expert];
}

// Whether they ascend from 0 to the number of rows at most.
inline bool ends_ascend(const GroupOffsets& groups, std::int64_t rows) {
  std::int64_t before = 0;
  for (std::int64_t expert = 0; expert < groups.experts; ++expert) {
    const std::int64_t end = end_of(groups, expert);
    if (end < before) return false;
    before = end;
  }
  return before <= rows;
}

}  // namespace qkern
