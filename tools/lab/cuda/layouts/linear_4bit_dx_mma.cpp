// The layouts of linear_4bit_dx_mma.cu in shared memory.
#include "linear_4bit_dx_mma.cu"

#include "conflicts.h"

int main() {
  using namespace qkern::cuda;
  for (int first = 0; first < kTileM * kRowChunks; first += 32) {
    layouts::check("write dy", 16, [&](int lane) {
      const int index = first + lane, chunk = index % kRowChunks;
      return 16 * dy_position(index / kRowChunks, chunk % 4, chunk / 4);
    });
  }
  for (int row = 0; row < kTileM; row += 8) {
    for (int half = 0; half < 2; ++half) {
      layouts::check("read dy", 16,
                     [&](int lane) { return 16 * dy_position(row + lane / 4, lane % 4, half); });
    }
  }
  for (int first = 0; first < kTileDepth * kWarps; first += 32) {
    layouts::check("write codes", 16, [&](int lane) {
      return 16 * code_position((first + lane) / kWarps, (first + lane) % kWarps);
    });
  }
  // Lane (g, t) reads the 16-bit code g of row 32 half + 8t + i.
  for (int warp = 0; warp < kWarps; ++warp) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 8; ++i) {
        layouts::check("read codes", 2, [&](int lane) {
          return 16 * code_position(32 * half + 8 * (lane % 4) + i, warp) + 2 * (lane / 4);
        });
      }
    }
  }
  // Four scales of rows 32 half + 8t.
  for (int half = 0; half < 2; ++half) {
    layouts::check("read scales", 16, [&](int lane) { return 4 * (32 * half + 8 * (lane % 4)); });
  }
  return layouts::failures;
}
