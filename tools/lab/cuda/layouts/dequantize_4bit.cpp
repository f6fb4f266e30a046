// The layouts of dequantize_4bit.cu in shared memory.
#include "dequantize_4bit.cu"

#include "conflicts.h"

int main() {
  using namespace qkern::cuda;
  constexpr int kQuads = kWarp / kLaneChunks;
  for (int c = 0; c < kLaneChunks; ++c) {
    layouts::check("write chunks", 16, [&](int lane) { return 16 * chunk_position(lane, c); });
  }
  for (int i = 0; i < kLaneChunks; ++i) {
    layouts::check("read chunks", 16, [&](int lane) {
      return 16 * (chunk_position(lane / kLaneChunks, lane % kLaneChunks) +
                   chunk_position(i * kQuads, 0));
    });
    // What is read so is chunk lane % 4 of the lane that the kernel takes it for.
    for (int lane = 0; lane < kWarp; ++lane) {
      const int owner = i * kQuads + lane / kLaneChunks;
      if (chunk_position(owner, lane % kLaneChunks) !=
          chunk_position(lane / kLaneChunks, lane % kLaneChunks) + chunk_position(i * kQuads, 0)) {
        ++layouts::failures;
      }
    }
  }
  return layouts::failures;
}
