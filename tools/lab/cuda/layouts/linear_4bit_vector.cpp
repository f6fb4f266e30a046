// The layout of x in shared memory in linear_4bit_vector.cu.
#include "linear_4bit_vector.cu"

#include "conflicts.h"

template <typename T>
void check() {
  using Shared = qkern::cuda::VectorShared<T, 1>;
  for (int j = 0; j < Shared::kChunks; ++j) {
    layouts::check("read x", 16, [&](int lane) { return 16 * Shared::position(lane, j); });
  }
  std::set<int> written;
  for (int first = 0; first < Shared::kTileChunks; first += 32) {
    layouts::check("write x", 16, [&](int lane) {
      const int thread = first + lane;
      return 16 * Shared::position(Shared::written_lane(thread), Shared::written_chunk(thread));
    });
    for (int i = first; i < first + 32; ++i) {
      written.insert(Shared::written_lane(i) * Shared::kChunks + Shared::written_chunk(i));
    }
  }
  // Value by value: 32 of a lane are written at once, and one of each lane read.
  for (int at = 0; at < 32; ++at) {
    constexpr int kSize = static_cast<int>(sizeof(T));
    layouts::check("write singly", kSize,
                   [&](int i) { return kSize * qkern::cuda::single_position(at, i); });
    layouts::check("read singly", kSize,
                   [&](int lane) { return kSize * qkern::cuda::single_position(lane, at); });
  }
  // Each chunk of a tile once.
  if (static_cast<int>(written.size()) != Shared::kTileChunks) ++layouts::failures;
}

int main() {
  check<float>();
  check<qkern::Float16>();
  check<qkern::BFloat16>();
  return layouts::failures;
}
