#pragma once

#include <cstdint>

namespace qkern::cpu {

// The sum of n floats, rounded once to double; NaN where any of them is not finite.
double exact_sum(const float* values, std::int64_t n, int num_threads);

}  // namespace qkern::cpu
