// How linear_4bit_vector.cu has x in shared memory.
#pragma once

#include "groups.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 128;  // of a group
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxShares = 4;
constexpr int kLaneCodes = 32;  // one 128-bit load; within one block where K % 32 == 0
constexpr int kTile = kWarp * kLaneCodes;
// Offsets within a part of the contraction fit 32 bits.
constexpr std::int64_t kLongestPart = 1 << 30;

template <typename T>
constexpr int kChunkValues = 16 / static_cast<int>(sizeof(T));

// Some tiles of x for each group, in 16-byte chunks, such that the lanes' chunks j of a tile are
// neighbours, chunks 32j...32j+31.
template <typename T, int kRows>
struct VectorShared {
  static constexpr int kChunks = kLaneCodes * static_cast<int>(sizeof(T)) / 16;  // of a lane
  static constexpr int kTileChunks = kChunks * kWarp;
  static constexpr int at_least_1(int count) { return count > 0 ? count : 1; }
  // So that few barriers are met, within 8 KiB a group where rows are few, and 32 KiB a block.
  static constexpr int kTiles = at_least_1(512 / (kRows * kTileChunks));
  static constexpr int kFitting = at_least_1(2048 / (kTiles * kRows * kTileChunks));
  // One row needs few registers, and many loads under way.
  static constexpr int kMost = kRows == 1 ? kMaxShares : 2;
  static constexpr int kGroups = kFitting < kMost ? kFitting : kMost;
  static constexpr int kResidentBlocks = kGroups == 1 ? 3 : 1;

  CodeTable table;
  float sums[kMaxShares][kWarps][kWarp];
  uint4 x[kGroups][kTiles][kRows][kTileChunks];  // no more groups than are launched

  QKERN_DEVICE static int position(int lane, int j) { return j * kWarp + lane; }

  // What thread i of a group writes of a tile, as chunk j of a lane: eight threads write for eight
  // lanes, whose places are in eight groups of banks, and a warp for as many whole sectors.
  QKERN_DEVICE static int written_lane(int i) { return i / (8 * kChunks) * 8 + i % 8; }
  QKERN_DEVICE static int written_chunk(int i) { return i / 8 % kChunks; }
};

template <typename T>
struct VectorArgs : Operands<T> {
  std::int64_t split_length;
  std::int64_t share_length;  // of a part's `shares`, whole tiles
  int shares;
  Epilogue<T> epilogue;
  T* y;
  float* parts;  // instead of y where the contraction is split
};

// Eight values of a lane from the staged tile.
template <typename T, int kRows>
QKERN_DEVICE void staged8(const VectorShared<T, kRows>& shared, int group, int tile, int row,
                          int lane, int eight, float (&out)[8]) {
  if constexpr (sizeof(T) == 2) {
    const uint4 bits = shared.x[group][tile][row][shared.position(lane, eight)];
    unpack_pair<T>(bits.x, out + 0);
    unpack_pair<T>(bits.y, out + 2);
    unpack_pair<T>(bits.z, out + 4);
    unpack_pair<T>(bits.w, out + 6);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 bits = shared.x[group][tile][row][shared.position(lane, 2 * eight + half)];
      out[4 * half + 0] = __uint_as_float(bits.x);
      out[4 * half + 1] = __uint_as_float(bits.y);
      out[4 * half + 2] = __uint_as_float(bits.z);
      out[4 * half + 3] = __uint_as_float(bits.w);
    }
  }
}

// Where value i of a lane lies in a tile that is read one by one: both the lanes that read it and
// the threads that write a lane's 32 values meet 32 banks.
QKERN_DEVICE int single_position(int lane, int i) { return i * kWarp + (lane ^ i); }
static_assert(kLaneCodes == kWarp, "values of a lane are as many as lanes");

// One value of a lane from the tile staged by `stage_singly`.
template <typename T, int kRows>
QKERN_DEVICE float staged1(const VectorShared<T, kRows>& shared, int group, int tile, int row,
                           int lane, int i) {
  const T* const values = reinterpret_cast<const T*>(shared.x[group][tile][row]);
  return to_float(values[single_position(lane, i)]);
}

// A group copies x[row0 ..., k0 ... k0 + tiles * kTile) with zeros past the ends, in 16-byte
// pieces.
template <typename T, int kRows>
QKERN_DEVICE void stage_pieces(const VectorArgs<T>& args, std::int64_t row0, std::int64_t k0,
                               int tiles, int group, VectorShared<T, kRows>& shared) {
  using Shared = VectorShared<T, kRows>;
  constexpr int kTileChunks = Shared::kTileChunks;
  const int first = static_cast<int>(threadIdx.x) % kThreads;
#pragma unroll 1
  for (int row = 0; row < kRows; ++row) {
#pragma unroll 4
    for (int i = first; i < tiles * kTileChunks; i += kThreads) {
      const int tile = i / kTileChunks;
      const int lane = Shared::written_lane(i % kTileChunks);
      const int j = Shared::written_chunk(i % kTileChunks);
      const int chunk = tile * kTileChunks + lane * Shared::kChunks + j;
      const std::int64_t k = k0 + chunk * kChunkValues<T>;
      const bool exists = row0 + row < args.m && k < args.cols;
      shared.x[group][tile][row][Shared::position(lane, j)] =
          exists ? load_global16(args.x + (row0 + row) * args.x_row_stride + k) : uint4{0, 0, 0, 0};
    }
  }
}

// The same, a value at a time.
template <typename T, int kRows>
QKERN_DEVICE void stage_singly(const VectorArgs<T>& args, std::int64_t row0, std::int64_t k0,
                               int tiles, int group, VectorShared<T, kRows>& shared) {
  const int first = static_cast<int>(threadIdx.x) % kThreads;
#pragma unroll 1
  for (int row = 0; row < kRows; ++row) {
#pragma unroll 4
    for (int i = first; i < tiles * kTile; i += kThreads) {
      const std::int64_t k = k0 + i;
      const bool exists = row0 + row < args.m && k < args.cols;
      T* const values = reinterpret_cast<T*>(shared.x[group][i / kTile][row]);
      values[single_position(i % kTile / kLaneCodes, i % kLaneCodes)] =
          exists ? args.x[(row0 + row) * args.x_row_stride + k] : T{};
    }
  }
}

}  // namespace
}  // namespace qkern::cuda
