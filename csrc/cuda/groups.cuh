// Matmuls by experts: several weights of one shape, each by its own rows of x, in one launch.
//
// Where an expert's rows end only the device knows, so a launch has as many tiles of rows as rows
// could be shared out to at worst, and each block finds its own tile among those that there are.
// From there on it is a block of the matmul of one weight.
#pragma once

#include "linear.cuh"
#include "qkern/experts.h"

namespace qkern::cuda {
namespace {

struct Groups {
  const void* offsets;  // [experts], where the rows of each end
  bool wide;            // int64, else int32
  int experts;
  ExpertStride stride;
};

template <typename Args>
struct Grouped {
  Args all;  // of all rows, by the first weight and bias
  Groups groups;
};

// A tile of rows of x, all of one expert; or of none, then `expert` is how many there are.
struct GroupTile {
  int expert;
  int first, rows;  // that the expert has
  unsigned row0;    // of the tile, among them
};

// Where the rows of an expert end, at most at x's end whatever the number is.
QKERN_DEVICE int end_of(const Groups& groups, int expert, int m) {
  if (groups.wide) {
    const std::int64_t end = __ldg(static_cast<const std::int64_t*>(groups.offsets) + expert);
    return end < 0 ? 0 : end < m ? static_cast<int>(end) : m;
  }
  const int end = __ldg(static_cast<const std::int32_t*>(groups.offsets) + expert);
  return end < m ? end : m;
}

QKERN_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// The index-th tile of kTileRows rows, those of rows of no expert last; row0 is past the rows where
// there are fewer. All lanes of a warp call it, each warp by itself, and no shared memory is
// touched: a lane looks at a run of experts, twice, and two scans join the runs. An end that lies
// before another, or before 0, is moved up to it, so tiles never overlap.
template <int kTileRows>
QKERN_DEVICE GroupTile find_tile(const Groups& groups, int m, unsigned index) {
  const auto tiles_of = [](int begin, int end) {
    return (static_cast<unsigned>(end - begin) + kTileRows - 1) / kTileRows;
  };
#ifdef QKERN_EVEN_GROUPS
  // For provers of race-freedom, who know nothing of what lies in memory: all have as many rows,
  // those of no expert among them.
  const int even = m / (groups.experts + 1);
  const int of = static_cast<int>(index / tiles_of(0, even));
  return {of, of * even, even, index % tiles_of(0, even) * kTileRows};
#endif
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int run = (groups.experts + kWarp - 1) / kWarp;
  const int run_begin = lane * run;
  const int run_end = run_begin + run < groups.experts ? run_begin + run : groups.experts;
  int last = 0;
#pragma unroll 4
  for (int expert = run_begin; expert < run_end; ++expert) {
    last = larger(last, end_of(groups, expert, m));
  }
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    last = larger(last, __shfl_up_sync(kAllLanes, last, static_cast<unsigned>(step)));
  }
  const int before = __shfl_up_sync(kAllLanes, last, 1u);
  const int begin = lane == 0 ? 0 : before;
  unsigned tiles = 0;
  int at = begin;
#pragma unroll 4
  for (int expert = run_begin; expert < run_end; ++expert) {
    const int end = larger(at, end_of(groups, expert, m));
    tiles += tiles_of(at, end);
    at = end;
  }
  unsigned up_to = tiles;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, up_to, static_cast<unsigned>(step));
    if (lane >= step) up_to += other;
  }
  const int owner = __popc(__ballot_sync(kAllLanes, up_to <= index ? 1 : 0));
  if (owner == kWarp) {
    const int end = __shfl_sync(kAllLanes, last, kWarp - 1);
    const unsigned count = __shfl_sync(kAllLanes, up_to, kWarp - 1);
    return {groups.experts, end, m - end, (index - count) * kTileRows};
  }
  at = __shfl_sync(kAllLanes, begin, owner);
  unsigned left = index - __shfl_sync(kAllLanes, up_to - tiles, owner);
  int expert = owner * run;
  int end = larger(at, end_of(groups, expert, m));
  // That it ends is known; the limit is for offsets that change meanwhile.
  while (left >= tiles_of(at, end) && expert + 1 < groups.experts) {
    left -= tiles_of(at, end);
    at = end;
    end = larger(at, end_of(groups, ++expert, m));
  }
  return {expert, at, end - at, left * kTileRows};
}

// All rows of an expert, as tiles have them; row0 is 0. All lanes of a warp call it, likewise.
QKERN_DEVICE GroupTile find_group(const Groups& groups, int m, int expert) {
#ifdef QKERN_EVEN_GROUPS
  const int even = m / (groups.experts + 1);
  return {expert, expert * even, even, 0};
#endif
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int begin = 0;
#pragma unroll 4
  for (int before = lane; before < expert; before += kWarp) {
    begin = larger(begin, end_of(groups, before, m));
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    begin = larger(begin, __shfl_xor_sync(kAllLanes, begin, step));
  }
  return {expert, begin, larger(begin, end_of(groups, expert, m)) - begin, 0};
}

// Zeros in a tile of rows; the blocks side by side share them.
template <typename T>
QKERN_DEVICE void clear_rows(T* y, std::int64_t columns, const GroupTile& found, int tile_rows) {
  const std::int64_t row0 = found.row0;
  if (row0 >= found.rows) return;
  const std::int64_t rows = found.rows - row0 < tile_rows ? found.rows - row0 : tile_rows;
  T* const out = y + (found.first + row0) * columns;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.y) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
       i < rows * columns; i += stride) {
    out[i] = T{};
  }
}

// Of the tile of this block, at (x, y) of the grid: `own`, a copy of what is of all, becomes what
// is of its expert. False where there is nothing left to do. `y` and `epilogue` are those in `own`.
template <int kTileRows, typename T, typename Args>
QKERN_DEVICE bool take_tile(const Grouped<Args>& args, std::int64_t columns, Args& own, T*& y,
                            Epilogue<T>& epilogue, Tile& tile) {
  const Groups& groups = args.groups;
  const GroupTile found = find_tile<kTileRows>(groups, static_cast<int>(args.all.m), blockIdx.x);
  if (found.expert == groups.experts) {
    clear_rows(y, columns, found, kTileRows);
    return false;
  }
  const std::int64_t expert = found.expert;
  own.x += found.first * own.x_row_stride;
  own.m = found.rows;
  own.packed += expert * groups.stride.packed;
  own.scales.absmax =
      static_cast<const unsigned char*>(own.scales.absmax) + expert * groups.stride.absmax;
  if (own.scales.nested_absmax != nullptr) {
    own.scales.nested_absmax += expert * groups.stride.nested_absmax;
    own.scales.nested_offset += expert;
  }
  if (epilogue.bias != nullptr) epilogue.bias += expert * own.rows;
  y += found.first * columns;
  tile = {found.row0, blockIdx.y, 0};
  return true;
}

template <int kTileRows, typename T>
QKERN_DEVICE bool take_tile(const Grouped<MmaArgs<T>>& args, MmaArgs<T>& own, Tile& tile) {
  MmaOutput<T>& output = own.output;
  const bool taken =
      take_tile<kTileRows>(args, output.columns, own, output.y, output.epilogue, tile);
  output.m = own.m;
  output.parts = nullptr;  // the compiler need not know how parts are stored
  return taken;
}

// Host.

template <typename Args>
Grouped<Args> grouped(const GroupedLinear4bitArgs& args, const Args& all) {
  return {all,
          {args.groups.offsets, args.groups.wide, static_cast<int>(args.groups.experts),
           expert_stride(args.all.weight)}};
}

// Rows of an expert, on average, if as few as can be have none.
inline std::int64_t mean_rows(const GroupedLinear4bitArgs& args) {
  const std::int64_t experts = args.groups.experts < args.all.m ? args.groups.experts : args.all.m;
  return experts == 0 ? args.all.m : ceil_div(args.all.m, experts);
}

// The most tiles of rows that there can be: n rows take (n + tile_rows - 1) / tile_rows of them,
// and it is worst where all that can be are rounded up, those of no expert among them.
inline std::int64_t most_tiles(std::int64_t m, std::int64_t experts, std::int64_t tile_rows) {
  const std::int64_t groups = experts + 1 < m ? experts + 1 : m;
  return (m + groups * (tile_rows - 1)) / tile_rows;
}

inline std::int64_t grouped_tiles(const GroupedLinear4bitArgs& args, std::int64_t tile_rows) {
  return most_tiles(args.all.m, args.groups.experts, tile_rows);
}

}  // namespace
}  // namespace qkern::cuda
