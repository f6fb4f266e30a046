// The layouts of linear_4bit_wgmma.cu in shared memory.
#include "linear_4bit_wgmma.cu"

#include "conflicts.h"

int main() {
  using namespace qkern::cuda;
  for (int first = 0; first < kThreads; first += 32) {
    layouts::check("write x", 16, [&](int lane) {
      return 16 * line_position((first + lane) / kLine, (first + lane) % kLine);
    });
    layouts::check("write codes", 16, [&](int lane) { return 16 * (first + lane); });
  }
  for (int warp_row = 0; warp_row < kTileN; warp_row += kWarpN) {
    for (int piece = 0; piece < kLaneRows * kRowCodes; ++piece) {
      layouts::check("read codes", 16, [&](int lane) {
        return 16 * ((warp_row + kLaneRows * (lane / 4)) * kRowCodes + piece);
      });
    }
    for (int row = 0; row < 2; ++row) {
      layouts::check("write sums", 8, [&](int lane) {
        return 4 * sum_position(2 * (lane % 4) + row, warp_row + kLaneRows * (lane / 4));
      });
    }
  }
  for (int row = 0; row < 8; ++row) {
    layouts::check("read sums", 16, [&](int lane) { return 4 * sum_position(row, 4 * lane); });
  }
  return layouts::failures;
}
