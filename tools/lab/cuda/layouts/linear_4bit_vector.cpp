// The layout of x in shared memory in linear_4bit_vector.cu.
#include "linear_4bit_vector.cu"

#include "conflicts.h"

template <typename T>
void check() {
  using Shared = qkern::cuda::VectorShared<T, 1>;
  for (int j = 0; j < Shared::kChunks; ++j) {
    layouts::check("read x", 16, [&](int lane) { return 16 * Shared::position(lane, j); });
  }
  for (int first = 0; first < Shared::kChunks * 32; first += 32) {
    layouts::check("write x", 16, [&](int lane) {
      const int chunk = first + lane;
      return 16 * Shared::position(chunk / Shared::kChunks, chunk % Shared::kChunks);
    });
  }
}

int main() {
  check<float>();
  check<qkern::Float16>();
  check<qkern::BFloat16>();
  return layouts::failures;
}
