// Twins of AMX's intrinsics; see immintrin.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace twins {

struct TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

struct Tiles {
  TileConfig config{};
  std::uint8_t data[8][16][64];
};
inline thread_local Tiles tiles;

// What the instructions fault on, but for a start row, which only an interrupted one leaves.
inline void require(bool holds) {
  if (!holds) __builtin_trap();
}
inline void require_tile(int tile) {
  require(tiles.config.palette == 1 && tile >= 0 && tile < 8);
  require(tiles.config.rows[tile] > 0 && tiles.config.row_bytes[tile] > 0);
}

}  // namespace twins

inline void _tile_loadconfig(const void* p) {
  twins::touch(p, 64);
  twins::TileConfig& config = twins::tiles.config;
  std::memcpy(&config, p, sizeof(config));
  twins::require(config.palette <= 1 && config.start_row == 0);
  for (int i = 0; i < 16; ++i) {
    twins::require(config.rows[i] <= (i < 8 ? 16 : 0) && config.row_bytes[i] <= (i < 8 ? 64 : 0));
  }
  std::memset(twins::tiles.data, 0, sizeof(twins::tiles.data));
}
inline void _tile_release() { twins::tiles.config = {}; }
inline void _tile_zero(int tile) {
  twins::require_tile(tile);
  std::memset(twins::tiles.data[tile], 0, sizeof(twins::tiles.data[tile]));
}
inline void _tile_loadd(int tile, const void* base, long long stride) {
  _tile_zero(tile);
  for (int r = 0; r < twins::tiles.config.rows[tile]; ++r) {
    const char* row = static_cast<const char*>(base) + r * stride;
    twins::touch(row, twins::tiles.config.row_bytes[tile]);
    std::memcpy(twins::tiles.data[tile][r], row, twins::tiles.config.row_bytes[tile]);
  }
}
inline void _tile_stored(int tile, void* base, long long stride) {
  twins::require_tile(tile);
  for (int r = 0; r < twins::tiles.config.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, twins::tiles.data[tile][r],
                twins::tiles.config.row_bytes[tile]);
  }
}
// Sums of the even and of the odd elements, each fused; then their sum is added.
inline void _tile_dpbf16ps(int sums, int a, int b) {
  using twins::tiles;
  twins::require_tile(sums);
  twins::require_tile(a);
  twins::require_tile(b);
  const int rows = tiles.config.rows[sums], lanes = tiles.config.row_bytes[sums] / 4;
  const int depth = tiles.config.row_bytes[a] / 4;
  twins::require(sums != a && sums != b && a != b && depth == tiles.config.rows[b]);
  twins::require(rows == tiles.config.rows[a] && lanes == tiles.config.row_bytes[b] / 4);
  for (int m = 0; m < rows; ++m) {
    std::uint16_t x[32];
    float sum[16], odd[16] = {}, even[16] = {};
    std::memcpy(x, tiles.data[a][m], sizeof(x));
    std::memcpy(sum, tiles.data[sums][m], sizeof(sum));
    for (int k = 0; k < depth; ++k) {
      std::uint16_t w[32];
      std::memcpy(w, tiles.data[b][k], sizeof(w));
      for (int n = 0; n < lanes; ++n) {
        even[n] = twins::multiply_add(even[n], x[2 * k], w[2 * n]);
        odd[n] = twins::multiply_add(odd[n], x[2 * k + 1], w[2 * n + 1]);
      }
    }
    for (int n = 0; n < lanes; ++n) {
      const float both = twins::flushed(even[n] + odd[n]);
      sum[n] = twins::flushed(twins::flushed(sum[n]) + both);
    }
    std::memcpy(tiles.data[sums][m], sum, sizeof(sum));
  }
}
