// The layouts of linear_4bit_mma.cu in shared memory.
#include "linear_4bit_mma.cu"

#include "conflicts.h"

int main() {
  using namespace qkern::cuda;
  // A warp's threads fill neighbouring chunks of two rows; lane (g, t) reads chunk 4t + s of row g.
  for (int first = 0; first < 64 * kRowChunks; first += 32) {
    layouts::check("write x", 16, [&](int lane) {
      const int index = first + lane, chunk = index % kRowChunks;
      return 16 * x_position(index / kRowChunks, chunk / 4, chunk % 4);
    });
  }
  for (int row = 0; row < 64; row += 8) {
    for (int s = 0; s < 4; ++s) {
      layouts::check("read x", 16,
                     [&](int lane) { return 16 * x_position(row + lane / 4, lane % 4, s); });
    }
  }
  layouts::check("codes", 16, [](int lane) { return 16 * lane; });
  return layouts::failures;
}
