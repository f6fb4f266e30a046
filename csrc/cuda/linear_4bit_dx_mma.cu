// dx = dy W on tensor cores. A block decodes each code of its tile of W once, into shared memory,
// and its warps, 64 rows of dy by 64 columns of W each, read fragments of both from there. Warps
// side by side have columns of their own; those of a block of 128 rows share them two by two.
//
// The contraction runs down W's rows, so a fragment's register pairs codes of two rows, which
// reading 8x8 matrices transposed gives. A lane decodes 32 neighbouring codes of a row: one 128-bit
// load, one scale. Chunk j of them in shared memory (16 bytes, eight values) is their columns j,
// 4 + j, 8 + j...; so lane (g, t), g = lane / 4 and t = lane % 4, gets columns 4g + j, which leaves
// it with neighbouring results.
#include "groups.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpRows = 64;                        // of dy
constexpr int kWarpColumns = 64;                     // of W
constexpr int kLaneCodes = 32;                       // the least block: one scale
constexpr int kDepth = 32;                           // rows of W a tile
constexpr int kChunk = 8;                            // 16-bit values in 16 bytes
constexpr int kDyChunks = kDepth / kChunk;           // of a row
constexpr int kPanelChunks = kWarpColumns / kChunk;  // of a row
constexpr int kLaneChunks = kLaneCodes / kChunk;
constexpr int kGroups = kWarpColumns / kLaneCodes;  // of 32 columns, a lane each
constexpr int kFragments = 2;                       // of 16 columns, in a group
constexpr int kFragmentsM = kWarpRows / 8;

// A panel is the tile of W that one warp multiplies, or several do.
template <int kTileM, int kStages>
struct DxShared {
  static constexpr int kSharing = kTileM / kWarpRows;  // warps with the same panel
  static constexpr int kPanels = kWarps / kSharing;
  static constexpr int kTileColumns = kPanels * kWarpColumns;
  // A warp's own panel is filled once the warp has read it; shared ones take turns.
  static constexpr int kBuffers = kSharing == 1 ? 1 : 2;

  CodeTable table;
  uint4 dy[kStages][kTileM * kDyChunks];
  uint4 w[kBuffers][kPanels][kDepth * kPanelChunks];
};

// Where chunks lie: eight rows' chunks of the same number, which make a matrix, and those that a
// quarter of a warp writes, are in eight different groups of banks.
QKERN_DEVICE int dy_position(int row, int chunk) {
  return row * kDyChunks + (chunk ^ ((row >> 1) & 3));
}
QKERN_DEVICE int w_position(int row, int chunk) { return row * kPanelChunks + (chunk ^ (row & 7)); }

template <typename T, int kTileM, int kStages>
QKERN_DEVICE void multiply_tile(const MmaArgs<T>& args, const Tile& place) {
  using Shared = DxShared<kTileM, kStages>;
  QKERN_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  stage_codes(args.source, shared.table);
  const float nested_offset = load_nested_offset(args.scales);

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int panel = warp % Shared::kPanels;
  // Of the panel, and of dy's rows.
  const int share = Shared::kSharing == 1 ? 0 : warp / Shared::kPanels;
  const std::int64_t m0 = place.row0;
  const std::int64_t k0 = place.columns * Shared::kTileColumns;
  const std::int64_t begin = place.part * args.split_length;
  const std::int64_t end =
      begin + args.split_length < args.rows ? begin + args.split_length : args.rows;
  const int tiles = static_cast<int>((end - begin + kDepth - 1) / kDepth);
  const std::int64_t column = k0 + panel * kWarpColumns;

  // A thread copies the same chunk of every kCopyRows-th row of dy; from where, moves on with each
  // tile.
  constexpr int kCopyRows = kThreads / kDyChunks;
  const int dy_row = thread / kDyChunks;
  const int dy_chunk = thread % kDyChunks;
  const T* dy_from = args.x + (m0 + dy_row) * args.x_row_stride + begin + dy_chunk * kChunk;
  const int dy_to = dy_position(dy_row, dy_chunk);
  static_assert(kCopyRows % 8 == 0, "dy_position of copied rows differs by whole rows");
  // Tiles within the split, and blocks within dy, which are nearly all, ask nothing of rows.
  const int full_tiles = static_cast<int>((end - begin) / kDepth);
  const int whole_tiles = m0 + kTileM <= args.m ? full_tiles : 0;

  // Called for one tile after the other.
  int fill_stage = 0;
  auto start_loads = [&](int tile) {
    const int stage = fill_stage;
    fill_stage = fill_stage == kStages - 1 ? 0 : fill_stage + 1;
    const T* dy = dy_from;
    if (tile < whole_tiles) {
#pragma unroll
      for (int i = 0; i < kTileM / kCopyRows; ++i) {
        cp_async16(&shared.dy[stage][dy_to + i * kCopyRows * kDyChunks], dy, true);
        dy += kCopyRows * args.x_row_stride;
      }
    } else if (tile < tiles) {
      const std::int64_t n = begin + static_cast<std::int64_t>(tile) * kDepth + dy_chunk * kChunk;
#pragma unroll
      for (int i = 0; i < kTileM / kCopyRows; ++i) {
        const bool exists = m0 + dy_row + i * kCopyRows < args.m && n < end;
        cp_async16(&shared.dy[stage][dy_to + i * kCopyRows * kDyChunks], exists ? dy : args.x,
                   exists);
        dy += kCopyRows * args.x_row_stride;
      }
    }
    dy_from += kDepth;
    // Also where there is no tile, so that the count of groups is the same in every round.
    cp_async_commit();
  };

  // A lane decodes half of one or more rows of the panel. What it takes is fetched before the
  // products of the tile before, and decoded after them. Where there are no weights, codes are 0
  // and the scale is 0 or the offset: dy is 0 there, or the result is not stored.
  constexpr int kPieces = kGroups / Shared::kSharing;
  constexpr int kPieceRows = kDepth / kGroups;  // that a warp's lanes have at once
  const int group = lane % kGroups;
  const int w_row = share * kPieceRows + lane / kGroups;
  const bool has_columns = column + group * kLaneCodes < args.cols;
  std::int64_t element = (begin + w_row) * args.cols + column + group * kLaneCodes;
  uint4 codes[kPieces];
  FetchedScale fetched[kPieces];
  auto fetch = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = tile * kDepth + i * kPieceRows + w_row;
      const std::int64_t at = element + i * kPieceRows * args.cols;
      if (has_columns && (tile < full_tiles || row < end - begin)) {
        codes[i] = load_global16(args.packed + at / 2);
        fetched[i] = fetch_scale(args.scales, at);
      } else {
        codes[i] = uint4{0, 0, 0, 0};
        fetched[i] = {0, 0.0f};
      }
    }
    element += kDepth * args.cols;
  };
  auto decode = [&](int tile) {
    uint4* const w = shared.w[tile % Shared::kBuffers][panel];
    ScaledTable<T> tables[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float scale = finish_scale(args.scales, nested_offset, fetched[i]);
      tables[i].fill(shared.table, scale);
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      std::uint32_t pairs[4][4];  // [word][j]: columns j and 4 + j of the word
      tables[i].decode8_apart(codes[i].x, pairs[0]);
      tables[i].decode8_apart(codes[i].y, pairs[1]);
      tables[i].decode8_apart(codes[i].z, pairs[2]);
      tables[i].decode8_apart(codes[i].w, pairs[3]);
#pragma unroll
      for (int j = 0; j < kLaneChunks; ++j) {
        w[w_position(i * kPieceRows + w_row, group * kLaneChunks + j)] =
            uint4{pairs[0][j], pairs[1][j], pairs[2][j], pairs[3][j]};
      }
    }
  };

  float sum[kGroups][kFragmentsM][kFragments][4];
#pragma unroll
  for (int c = 0; c < kGroups; ++c) clear(sum[c]);

#pragma unroll 1
  for (int tile = 0; tile < kStages - 1; ++tile) start_loads(tile);
  fetch(0);
  __syncthreads();  // the table is there
  decode(0);

  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    // This tile is there for all, and all are done with the stage and the panels filled next.
    __syncthreads();
    start_loads(tile + kStages - 1);
    fetch(tile + 1);

    const uint4* const w_tile = shared.w[tile % Shared::kBuffers][panel];
    const uint4* const dy_tile = &shared.dy[stage][share * kWarpRows * kDyChunks];
    // Lane 8i + r names row r of matrix i. Of W they are the first and second eight columns of a
    // fragment, in the first and second eight rows; of dy the chunks of eight rows and eight more.
    const int row = lane / 16 * 8 + lane % 8;
    const int chunk = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      std::uint32_t w[kGroups][kFragments][4];
#pragma unroll
      for (int c = 0; c < kGroups; ++c) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          const int first = 2 * (c * kFragments + f);
          load_matrices_transposed(&w_tile[w_position(16 * step + row, first + chunk)], w[c][f]);
        }
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; i += 2) {
        std::uint32_t two[4];
        load_matrices(&dy_tile[dy_position(8 * i + row, 2 * step + chunk)], two);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const std::uint32_t dy[2] = {two[2 * half], two[2 * half + 1]};
#pragma unroll
          for (int c = 0; c < kGroups; ++c) {
#pragma unroll
            for (int f = 0; f < kFragments; ++f) mma_16x8x16<T>(sum[c][i + half][f], w[c][f], dy);
          }
        }
      }
    }
    // All lanes have read the panel that they fill.
    if constexpr (Shared::kSharing == 1) __syncwarp();
    decode(tile + 1);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

#pragma unroll
  for (int c = 0; c < kGroups; ++c) {
    if (column + c * kLaneCodes >= args.cols) return;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
      store_fragments(args.output, sum[c][i], m0 + share * kWarpRows + 8 * i,
                      column + c * kLaneCodes, lane);
    }
  }
}

template <typename T, int kTileM, int kStages>
QKERN_KERNEL(kThreads, 2)
linear_4bit_dx_mma_kernel(const MmaArgs<T> args) {
  multiply_tile<T, kTileM, kStages>(args, this_tile(kTileM));
}

template <typename T, int kTileM, int kStages>
QKERN_KERNEL(kThreads, 2)
grouped_linear_4bit_dx_mma_kernel(const Grouped<MmaArgs<T>> args) {
  MmaArgs<T> own = args.all;
  Tile tile;
  if (take_tile<kTileM>(args, own, tile)) multiply_tile<T, kTileM, kStages>(own, tile);
}

constexpr int kStages = 3;

template <int kTileM>
LaunchConfig tile_config(std::int64_t row_tiles, std::int64_t columns, void* stream) {
  using Shared = DxShared<kTileM, kStages>;
  return {dim3(static_cast<unsigned>(row_tiles),
               static_cast<unsigned>(ceil_div(columns, Shared::kTileColumns))),
          kThreads, sizeof(Shared), stream};
}

template <typename T, int kTileM>
Status launch_tiles(const Linear4bitArgs& args, const Split& split, void* stream) {
  const std::int64_t columns = args.weight.cols;
  const LaunchConfig config = tile_config<kTileM>(ceil_div(args.m, kTileM), columns, stream);
  return launch_parts("linear_4bit_dx_mma_kernel", linear_4bit_dx_mma_kernel<T, kTileM, kStages>,
                      config, mma_args<T>(args, split, columns), args, split, columns);
}

template <typename T, int kTileM>
Status launch_grouped(const GroupedLinear4bitArgs& args, void* stream) {
  const Weight4bit& weight = args.all.weight;
  const LaunchConfig config = tile_config<kTileM>(grouped_tiles(args, kTileM), weight.cols, stream);
  const Split whole{1, weight.rows};
  return launch("grouped_linear_4bit_dx_mma_kernel",
                grouped_linear_4bit_dx_mma_kernel<T, kTileM, kStages>, config,
                grouped(args, mma_args<T>(args.all, whole, weight.cols)));
}

// Rows of dy that a block takes, of as many in all: a tile of W is decoded again for each. Where
// copies are not asynchronous a block waits for its own, so two have to fit the 64 KiB of sm_75.
int tile_rows(std::int64_t m, int capability) { return m <= 64 || capability < 80 ? 64 : 128; }

template <typename T>
Status linear_dx_mma_typed(const Linear4bitArgs& args, const Split& split, int capability,
                           void* stream) {
  return tile_rows(args.m, capability) == 64 ? launch_tiles<T, 64>(args, split, stream)
                                             : launch_tiles<T, 128>(args, split, stream);
}

template <typename T>
Status grouped_linear_dx_mma_typed(const GroupedLinear4bitArgs& args, int capability,
                                   void* stream) {
  return tile_rows(mean_rows(args), capability) == 64 ? launch_grouped<T, 64>(args, stream)
                                                      : launch_grouped<T, 128>(args, stream);
}

}  // namespace

Split linear_dx_mma_split(const Linear4bitArgs& args, int capability) {
  const std::int64_t rows = tile_rows(args.m, capability);
  const std::int64_t columns = kWarps * kWarpRows * kWarpColumns / rows;
  const std::int64_t blocks = ceil_div(args.m, rows) * ceil_div(args.weight.cols, columns);
  return split_for_mma(args, args.weight.rows, 16 * kDepth, blocks);
}

Status linear_dx_mma(const Linear4bitArgs& args, const Split& split, int capability, void* stream) {
  return args.dtype == DType::kFloat16
             ? linear_dx_mma_typed<Float16>(args, split, capability, stream)
             : linear_dx_mma_typed<BFloat16>(args, split, capability, stream);
}

Status grouped_linear_dx_mma(const GroupedLinear4bitArgs& args, int capability, void* stream) {
  return args.all.dtype == DType::kFloat16
             ? grouped_linear_dx_mma_typed<Float16>(args, capability, stream)
             : grouped_linear_dx_mma_typed<BFloat16>(args, capability, stream);
}

}  // namespace qkern::cuda
