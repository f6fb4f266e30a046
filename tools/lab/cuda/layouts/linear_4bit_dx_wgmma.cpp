// The layout of linear_4bit_dx_wgmma.cu in shared memory.
#include "linear_4bit_dx_wgmma.cu"

#include "conflicts.h"

int main() {
  using namespace qkern::cuda;
  // A lane has half a line of one of the panels.
  for (int first = 0; first < kPieceRows; first += 4) {
    for (int j = 0; j < kLaneChunks; ++j) {
      layouts::check("write w", 16, [&](int lane) {
        const int line = first + lane / 2 % 4;
        return 16 * (lane / 8 * kPanel + line_position(line, lane % 2 * kLaneChunks + j));
      });
    }
  }
  return layouts::failures;
}
