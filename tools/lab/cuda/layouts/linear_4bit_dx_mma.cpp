// The layouts of linear_4bit_dx_mma.cu in shared memory.
#include "linear_4bit_dx_mma.cu"

#include "conflicts.h"

int main() {
  using namespace qkern::cuda;
  for (int first = 0; first < 128 * kDyChunks; first += 32) {
    layouts::check("write dy", 16, [&](int lane) {
      return 16 * dy_position((first + lane) / kDyChunks, (first + lane) % kDyChunks);
    });
  }
  // Lane 8i + r reads row r of matrix i: two matrices of eight rows, and two of the next eight.
  for (int row = 0; row < 128; row += 16) {
    for (int chunk = 0; chunk < kDyChunks; chunk += 2) {
      layouts::check("read dy", 16, [&](int lane) {
        return 16 * dy_position(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2);
      });
    }
  }
  for (int row = 0; row < kDepth; row += 16) {
    for (int chunk = 0; chunk < kPanelChunks; chunk += 2) {
      layouts::check("read w", 16, [&](int lane) {
        return 16 * w_position(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2);
      });
    }
    // Two lanes have a row, of which each writes four chunks.
    for (int j = 0; j < kLaneChunks; ++j) {
      layouts::check("write w", 16, [&](int lane) {
        return 16 * w_position(row + lane / kGroups, lane % kGroups * kLaneChunks + j);
      });
    }
  }
  return layouts::failures;
}
