// y = x W^T + bias on tensor cores. A block takes kTileM rows of x and 128 rows of W; its warps
// split the rows of W, so each code is decoded once a block, straight into a fragment. For up to 16
// rows of x it takes 64 of W, so that there are blocks for a GPU, and groups of its warps take
// shares of the contraction, which are added in order.
//
// The contraction is permuted within a tile of 128: the fragments of lane (g, t), g = lane / 4 and
// t = lane % 4, hold elements 32t...32t+31 of a row, four of them a step. One 128-bit load is then
// a lane's codes of a row for the whole tile, and those lie in one quantisation block. x is read in
// the same order. W is the mma's first operand: rows g and g + 8 of a warp's fragment f are rows
// 4g + 2f and 4g + 2f + 1 of its part of W, which leaves a lane with neighbouring results.
#include "groups.cuh"

namespace qkern::cuda {
namespace {

constexpr int kFragments = 2;              // 16 rows of W each, of a warp
constexpr int kLaneRows = 2 * kFragments;  // of W
constexpr int kWarpN = 16 * kFragments;    // rows of W, columns of y
constexpr int kLaneCodes = 32;
constexpr int kTileK = 4 * kLaneCodes;
constexpr int kChunk = 8;  // 16-bit values in 16 bytes
constexpr int kRowChunks = kTileK / kChunk;

// The warps of a block: some for rows of W, in each of the groups.
template <int kTileM>
struct BlockShape {
  static constexpr int kGroups = kTileM <= 16 ? 4 : 1;
  static constexpr int kGroupWarps = kTileM <= 16 ? 2 : 4;
  static constexpr int kGroupThreads = kGroupWarps * kWarp;
  static constexpr int kThreads = kGroups * kGroupThreads;
  static constexpr int kTileN = kGroupWarps * kWarpN;
};

template <int kTileM, int kStages>
struct MmaShared {
  static constexpr bool kHasCodes = true;
  static constexpr int kGroups = BlockShape<kTileM>::kGroups;
  CodeTable table;
  uint4 x[kStages][kGroups][kTileM * kRowChunks];
  // What a thread put there, only it takes out: no barrier, no conflict.
  uint4 codes[kStages][kLaneRows][BlockShape<kTileM>::kThreads];
};

// Of 32 rows, several blocks fit the 64 KiB of sm_75: codes of the next tile wait in registers.
template <int kStages>
struct MmaShared<32, kStages> {
  static constexpr bool kHasCodes = false;
  CodeTable table;
  uint4 x[kStages][1][32 * kRowChunks];
};

// Where chunk 4t + s of a row of x lies: a linear map of the bits, such that both the lanes that
// read (fixed s; two rows, four t) and those that write (neighbouring chunks) meet eight different
// groups of banks.
QKERN_DEVICE int x_position(int row, int t, int s) {
  const int low = (t & 1) | ((t >> 1) & 1) << 1 | (row & 1) << 2;
  return (row * kRowChunks + ((t >> 1) << 3 | low)) ^ (s << 1);
}

// A copy of the arguments: by a reference to them the loop takes more instructions.
template <typename T, int kTileM, int kStages>
QKERN_DEVICE void multiply_tile(const MmaArgs<T> args, const Tile& place) {
  using Shared = MmaShared<kTileM, kStages>;
  using Shape = BlockShape<kTileM>;
  QKERN_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  stage_codes(args.source, shared.table);
  const float nested_offset = load_nested_offset(args.scales);

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const std::int64_t m0 = place.row0;
  const std::int64_t n0_block = place.columns * Shape::kTileN;
  const int group = Shape::kGroups == 1 ? 0 : thread / Shape::kGroupThreads;
  const int member = Shape::kGroups == 1 ? thread : thread % Shape::kGroupThreads;
  const std::int64_t n0 = n0_block + member / kWarp * kWarpN;
  const std::int64_t part = place.part * args.split_length;
  const std::int64_t part_end =
      part + args.split_length < args.cols ? part + args.split_length : args.cols;
  const std::int64_t length = Shape::kGroups == 1 ? args.split_length : args.share_length;
  const std::int64_t begin = part + group * length;
  const std::int64_t end = begin + length < part_end ? begin + length : part_end;
  const int tiles = end > begin ? static_cast<int>((end - begin + kTileK - 1) / kTileK) : 0;
  // The first group has as many as any, and barriers are for all.
  const std::int64_t longest = length < part_end - part ? length : part_end - part;
  const int rounds =
      Shape::kGroups == 1 ? tiles : static_cast<int>((longest + kTileK - 1) / kTileK);

  // A thread copies the same chunk of every kCopyRows-th row of x.
  constexpr int kCopyRows = Shape::kGroupThreads / kRowChunks;
  const int copy_row = member / kRowChunks;
  const int copy_chunk = member % kRowChunks;
  const T* x_from = args.x + (m0 + copy_row) * args.x_row_stride + begin + copy_chunk * kChunk;
  const std::int64_t copy_step = kCopyRows * args.x_row_stride;
  const int copies = args.m - m0 - copy_row > 0
                         ? static_cast<int>((args.m - m0 - copy_row + kCopyRows - 1) / kCopyRows)
                         : 0;
  const int x_to = x_position(copy_row, copy_chunk / 4, copy_chunk % 4);
  static_assert(kCopyRows % 2 == 0, "x_position of copied rows differs by whole rows");

  // Of W: the lane's rows, from its first code at `begin` on; a row past the end does not exist.
  const std::int64_t first_row = n0 + 4 * g;
  const int lane_rows = args.rows - first_row > kLaneRows
                            ? kLaneRows
                            : static_cast<int>(args.rows > first_row ? args.rows - first_row : 0);
  const std::int64_t first_element =
      (lane_rows > 0 ? first_row : 0) * args.cols + begin + t * kLaneCodes;
  const std::uint8_t* const codes_from = args.packed + first_element / 2;
  const std::int64_t row_bytes = args.cols / 2;
  ScaleRun run;
  run.start(args.scales, first_element);
  // A row that does not exist has codes of 0 and the last one's scale: its result is not stored.
  unsigned row_position[kLaneRows];
  row_position[0] = run.first;
#pragma unroll
  for (int j = 1; j < kLaneRows; ++j) {
    row_position[j] = row_position[j - 1] + (j < lane_rows ? static_cast<unsigned>(args.cols) : 0);
  }

  // Blocks within x and W, and tiles within the share, which are nearly all, ask nothing of rows.
  // Of few rows those past the end are never copied: their results are not stored.
  constexpr bool kLeavesRows = kTileM <= 16;
  const bool whole_rows =
      (kLeavesRows || m0 + kTileM <= args.m) && n0_block + Shape::kTileN <= args.rows;
  const int whole_tiles = whole_rows && end > begin ? static_cast<int>((end - begin) / kTileK) : 0;

  auto start_loads = [&](int tile) {
    const int stage = tile % kStages;
    const int k0 = tile * kTileK;
    const T* from = x_from + k0;
    if (tile < whole_tiles) {
#pragma unroll
      for (int i = 0; i < kTileM / kCopyRows; ++i) {
        if (!kLeavesRows || i < copies) {
          cp_async16(&shared.x[stage][group][x_to + i * kCopyRows * kRowChunks], from, true);
        }
        from += copy_step;
      }
      if constexpr (Shared::kHasCodes) {
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) {
          cp_async16(&shared.codes[stage][j][thread], codes_from + k0 / 2 + j * row_bytes, true);
        }
      }
    } else if (tile < tiles) {
      // What lies past the end of the split is not read.
      const bool x_in_range = begin + k0 + copy_chunk * kChunk < end;
#pragma unroll
      for (int i = 0; i < kTileM / kCopyRows; ++i) {
        cp_async16(&shared.x[stage][group][x_to + i * kCopyRows * kRowChunks], from,
                   x_in_range && i < copies);
        from += copy_step;
      }
      if constexpr (Shared::kHasCodes) {
        const bool in_range = begin + k0 + t * kLaneCodes < end;
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) {
          cp_async16(&shared.codes[stage][j][thread], codes_from + k0 / 2 + j * row_bytes,
                     in_range && j < lane_rows);
        }
      }
    }
    // Also where there is no tile, so that the count of groups is the same in every round.
    cp_async_commit();
  };
  uint4 next_codes[kLaneRows];
  auto fetch_codes = [&](int tile) {
    const int k0 = tile * kTileK;
    const bool in_range = begin + k0 + t * kLaneCodes < end;
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
      next_codes[j] = tile < whole_tiles || (in_range && j < lane_rows)
                          ? load_global16(codes_from + k0 / 2 + j * row_bytes)
                          : uint4{0, 0, 0, 0};
    }
  };
  // The scales of the lane's rows, fetched before the products of a tile and finished after them.
  // Where there are no weights, the scale is 0 or the offset: x is 0 there.
  FetchedScale fetched[kLaneRows];
  auto fetch_tile_scales = [&](int tile) {
    const int k0 = tile * kTileK;
    if (begin + k0 + t * kLaneCodes >= end || lane_rows == 0) {
#pragma unroll
      for (int j = 0; j < kLaneRows; ++j) fetched[j] = {0, 0.0f};
      return;
    }
    unsigned positions[kLaneRows];
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) positions[j] = row_position[j] + k0;
    fetch_scales(args.scales, run, positions, fetched);
  };

  constexpr int kFragmentsM = kTileM / 8;
  float sum[kFragmentsM][kFragments][4];
  clear(sum);

  float scales[kLaneRows];
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) start_loads(stage);
  if constexpr (!Shared::kHasCodes) fetch_codes(0);
  fetch_tile_scales(0);
  finish_scales(args.scales, nested_offset, fetched, scales);

  for (int tile = 0; tile < rounds; ++tile) {
    cp_async_wait<kStages - 2>();
    // This tile is there for all, and all are done with the stage that is filled next.
    __syncthreads();
    start_loads(tile + kStages - 1);

    if (Shape::kGroups > 1 && tile >= tiles) continue;
    const int stage = tile % kStages;
    const uint4* const x_tile = shared.x[stage][group];
    ScaledTable<T> tables[kLaneRows];
    uint4 codes[kLaneRows];
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
      tables[j].fill(shared.table, scales[j]);
      if constexpr (Shared::kHasCodes) {
        codes[j] = shared.codes[stage][j][thread];
      } else {
        codes[j] = next_codes[j];
      }
    }
    if constexpr (!Shared::kHasCodes) fetch_codes(tile + 1);
    fetch_tile_scales(tile + 1);

#pragma unroll
    for (int s = 0; s < 4; ++s) {
      // Eight codes of each row: two steps of four.
      std::uint32_t w[kLaneRows][4];
#pragma unroll
      for (int j = 0; j < kLaneRows; ++j) {
        tables[j].decode8(s == 0   ? codes[j].x
                          : s == 1 ? codes[j].y
                          : s == 2 ? codes[j].z
                                   : codes[j].w,
                          w[j]);
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        const uint4 values = x_tile[x_position(g, t, s) + 8 * i * kRowChunks];
        const std::uint32_t x[2][2] = {{values.x, values.y}, {values.z, values.w}};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            const std::uint32_t rows[4] = {w[2 * f][2 * step], w[2 * f + 1][2 * step],
                                           w[2 * f][2 * step + 1], w[2 * f + 1][2 * step + 1]};
            mma_16x8x16<T>(sum[i][f], rows, x[step]);
          }
        }
      }
    }
    finish_scales(args.scales, nested_offset, fetched, scales);
  }

  if constexpr (Shape::kGroups > 1) {
    // Where x was, [group - 1][warp][element][lane].
    constexpr int kElements = kFragmentsM * kFragments * 4;
    float* const sums =
        reinterpret_cast<float*>(shared.x) + member / kWarp * kElements * kWarp + lane;
    constexpr int kGroupSums = Shape::kGroupWarps * kElements * kWarp;
    static_assert((Shape::kGroups - 1) * kGroupSums * sizeof(float) <= sizeof(shared.x));
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float mine = sum[e / (4 * kFragments)][e / 4 % kFragments][e % 4];
      if (group > 0) sums[(group - 1) * kGroupSums + e * kWarp] = mine;
    }
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int other = 0; other < Shape::kGroups - 1; ++other) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        float& mine = sum[e / (4 * kFragments)][e / 4 % kFragments][e % 4];
        mine = __fadd_rn(mine, sums[other * kGroupSums + e * kWarp]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
    store_fragments(args.output, sum[i], m0 + 8 * i, n0, lane);
  }
}

template <typename T, int kTileM, int kStages>
QKERN_KERNEL((BlockShape<kTileM>::kThreads), (BlockShape<kTileM>::kGroups == 1 ? 2 : 1))
linear_4bit_mma_kernel(const MmaArgs<T> args) {
  multiply_tile<T, kTileM, kStages>(args, this_tile(kTileM));
}

template <typename T, int kTileM, int kStages>
QKERN_KERNEL((BlockShape<kTileM>::kThreads), (BlockShape<kTileM>::kGroups == 1 ? 2 : 1))
grouped_linear_4bit_mma_kernel(const Grouped<MmaArgs<T>> args) {
  MmaArgs<T> own = args.all;
  Tile tile;
  if (take_tile<kTileM>(args, own, tile)) multiply_tile<T, kTileM, kStages>(own, tile);
}

// The length of a group's share. A batch-invariant call has one: then a row of the result is summed
// as in blocks of more rows.
template <int kTileM>
std::int64_t share_length(const Linear4bitArgs& args, const Split& split) {
  constexpr int kGroups = BlockShape<kTileM>::kGroups;
  const std::int64_t length = split.length < args.weight.cols ? split.length : args.weight.cols;
  if (kGroups == 1 || args.batch_invariant) return length;
  return split_for(length, kTileK, 1, kGroups, kGroups).length;
}

template <typename T, int kTileM>
MmaArgs<T> tile_args(const Linear4bitArgs& args, const Split& split) {
  MmaArgs<T> found = mma_args<T>(args, split, args.weight.rows);
  found.share_length = share_length<kTileM>(args, split);
  return found;
}

template <int kTileM, int kStages>
LaunchConfig tile_config(std::int64_t row_tiles, std::int64_t columns, void* stream) {
  using Shape = BlockShape<kTileM>;
  return {dim3(static_cast<unsigned>(row_tiles),
               static_cast<unsigned>(ceil_div(columns, Shape::kTileN))),
          Shape::kThreads, sizeof(MmaShared<kTileM, kStages>), stream};
}

template <typename T, int kTileM, int kStages>
Status launch_tiles(const Linear4bitArgs& args, const Split& split, void* stream) {
  const std::int64_t columns = args.weight.rows;
  const LaunchConfig config =
      tile_config<kTileM, kStages>(ceil_div(args.m, kTileM), columns, stream);
  const MmaArgs<T> kernel_args = tile_args<T, kTileM>(args, split);
  return launch_parts("linear_4bit_mma_kernel", linear_4bit_mma_kernel<T, kTileM, kStages>, config,
                      kernel_args, args, split, columns);
}

template <typename T, int kTileM, int kStages>
Status launch_grouped(const GroupedLinear4bitArgs& args, void* stream) {
  const Split whole{1, args.all.weight.cols};
  const LaunchConfig config =
      tile_config<kTileM, kStages>(grouped_tiles(args, kTileM), args.all.weight.rows, stream);
  return launch("grouped_linear_4bit_mma_kernel",
                grouped_linear_4bit_mma_kernel<T, kTileM, kStages>, config,
                grouped(args, tile_args<T, kTileM>(args.all, whole)));
}

// Rows of x that a block takes, of m. Where copies are not asynchronous a block waits for its own,
// so several have to fit the 64 KiB of sm_75.
int tile_rows(std::int64_t m, int capability) {
  if (capability < 80) return 32;
  return m <= 16 ? 16 : m <= 32 ? 32 : 64;
}

template <int kRows, int kCount>
struct TileShape {
  static constexpr int kTileM = kRows;
  static constexpr int kStages = kCount;
};

// Calls fn with a zero of the storage type and the shape of a tile of `rows`.
template <typename Fn>
Status with_tile(DType dtype, int rows, const Fn& fn) {
  const auto of = [&](auto shape) {
    return dtype == DType::kFloat16 ? fn(Float16{}, shape) : fn(BFloat16{}, shape);
  };
  return rows == 16   ? of(TileShape<16, 3>{})
         : rows == 32 ? of(TileShape<32, 2>{})
                      : of(TileShape<64, 2>{});
}

}  // namespace

Split linear_mma_split(const Linear4bitArgs& args, int capability) {
  const int rows = tile_rows(args.m, capability);
  const bool has_groups = rows == 16;
  const std::int64_t columns = has_groups ? BlockShape<16>::kTileN : BlockShape<64>::kTileN;
  const std::int64_t blocks = ceil_div(args.m, rows) * ceil_div(args.weight.rows, columns);
  // Where a block has shares, few blocks are better than a second kernel.
  constexpr std::int64_t kFew = 32;
  return split_for_mma(args, args.weight.cols, 4 * kTileK, blocks,
                       has_groups ? kFew : kBlocksWanted);
}

Status linear_mma(const Linear4bitArgs& args, const Split& split, int capability, void* stream) {
  return with_tile(args.dtype, tile_rows(args.m, capability), [&](auto zero, auto shape) {
    return launch_tiles<decltype(zero), shape.kTileM, shape.kStages>(args, split, stream);
  });
}

Status grouped_linear_mma(const GroupedLinear4bitArgs& args, int capability, void* stream) {
  // A tile of 64 rows issues no more a weight than one of 16. So it holds twice the rows that an
  // expert has on average, and few experts take a second tile, which would decode W again.
  const int rows = tile_rows(2 * mean_rows(args), capability);
  return with_tile(args.all.dtype, rows, [&](auto zero, auto shape) {
    return launch_grouped<decltype(zero), shape.kTileM, shape.kStages>(args, stream);
  });
}

}  // namespace qkern::cuda
