// y = x W^T + bias by Hopper's products of warpgroups (sm_90a). A block takes kTileM rows of x and
// 128 of W; each of its two warpgroups has 64 of these for the products' first operand, decoded
// straight into registers while the products before run. x is copied to shared memory, where both
// read it.
//
// A line of shared memory is 64 elements of a row of x, one tile of the contraction. Of each eight
// of them, lane (g, t), g = lane / 4 and t = lane % 4, multiplies numbers 2t and 2t + 1: byte t of
// the four that hold their codes. A warp's rows g and g + 8 are rows 2g and 2g + 1 of its part of
// W, which leaves a lane with neighbouring results.
#include "linear.cuh"
#include "ptx_hopper.h"

namespace qkern::cuda {
namespace {

constexpr int kWarpgroups = 2;
constexpr int kThreads = kWarpgroups * 4 * kWarp;
constexpr int kWarpN = 16;  // rows of W
constexpr int kTileN = kThreads / kWarp * kWarpN;
constexpr int kTileK = 64;
constexpr int kChunk = 8;  // 16-bit values in 16 bytes
constexpr int kLine = kMatrixLine;
static_assert(kTileK == kLine * kChunk);
constexpr int kSteps = kTileK / 16;         // products of a tile
constexpr int kLaneRows = 2;                // of W
constexpr int kRowCodes = kTileK / 2 / 16;  // 16-byte pieces of a row's codes

// A tile of x is copied kAhead tiles before its products, and its place is filled again when those
// of the tile after it have started. Codes are wanted one tile earlier than x: they are decoded.
template <int kTileM>
struct WgmmaShared {
  static constexpr int kStages = kTileM == 256 ? 5 : 6;
  static constexpr int kAhead = kStages - 2;
  // Of the tile so many after the one of `stage`.
  QKERN_DEVICE static int after(int stage, int tiles) {
    return stage + tiles < kStages ? stage + tiles : stage + tiles - kStages;
  }
  uint4 x[kStages][kTileM * kLine];
  uint4 codes[kStages][kTileN * kRowCodes];
  CodeTable table;
};

// Where the sum for W's row `column` and x's row `row` of the tile waits for the others of its row:
// pairs of lanes with the same g, and of those t, meet different banks.
QKERN_DEVICE int sum_position(int row, int column) {
  return row * kTileN + (column ^ (row / 2 % 4 * 8));
}

// kHalves: both halves of a tile have scales of their own, where blocks are so short or begin
// within a tile.
template <typename T, int kTileM, bool kHalves>
QKERN_KERNEL(kThreads, 1)
linear_4bit_wgmma_kernel(const MmaArgs<T> args) {
  using Shared = WgmmaShared<kTileM>;
  QKERN_DYNAMIC_SHARED_1024(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  stage_codes(args.source, shared.table);
  const float nested_offset = load_nested_offset(args.scales);

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const int warp_row = thread / kWarp * kWarpN;
  const std::int64_t m0 = static_cast<std::int64_t>(blockIdx.x) * kTileM;
  const std::int64_t n0 = static_cast<std::int64_t>(blockIdx.y) * kTileN;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.z) * args.split_length;
  const std::int64_t end =
      begin + args.split_length < args.cols ? begin + args.split_length : args.cols;
  const int tiles = static_cast<int>((end - begin + kTileK - 1) / kTileK);
  const int full_tiles = static_cast<int>((end - begin) / kTileK);  // the last may be half a one

  // A thread copies the same chunk of every kCopyRows-th row of x. Rows past the end are not
  // copied: their results are not stored.
  constexpr int kCopyRows = kThreads / kLine;
  constexpr int kCopies = kTileM / kCopyRows;
  const int copy_row = thread / kLine;
  const int copy_chunk = thread % kLine;
  const std::int64_t rows_left = args.m - m0 - copy_row + kCopyRows - 1;
  const int copies =
      rows_left < kTileM ? static_cast<int>(rows_left > 0 ? rows_left : 0) / kCopyRows : kCopies;
  const T* x_from = args.x + (m0 + copy_row) * args.x_row_stride + begin + copy_chunk * kChunk;
  const int x_to = line_position(copy_row, copy_chunk);
  static_assert(kCopyRows % 8 == 0, "copied rows have their chunks at the same places");
  // And a piece of a row's codes. A row past the end is the last one: its results are not stored.
  const auto row_of = [&](std::int64_t row) { return row < args.rows ? row : args.rows - 1; };
  const std::uint8_t* codes_from = args.packed +
                                   (row_of(n0 + thread / kRowCodes) * args.cols + begin) / 2 +
                                   thread % kRowCodes * 16;
  static_assert(kTileN * kRowCodes == kThreads);

  const std::int64_t copy_step = kCopyRows * args.x_row_stride;
  const bool whole = copies == kCopies;
  auto copy_codes = [&](int tile, int stage) {
    if (tile < full_tiles || (tile < tiles && thread % kRowCodes == 0)) {
      cp_async16(&shared.codes[stage][thread], codes_from, true);
    }
    codes_from += kTileK / 2;
  };
  // Called for one tile after the other.
  auto start_loads = [&](int tile, int stage) {
    uint4* const to = &shared.x[stage][x_to];
    const T* from = x_from;
    if (whole && tile < full_tiles) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i, from += copy_step) {
        cp_async16(to + i * kCopyRows * kLine, from, true);
      }
    } else if (tile < tiles) {
      // Zeros past the end of the split.
      const bool exists = tile < full_tiles || copy_chunk < kLine / 2;
#pragma unroll 1
      for (int i = 0; i < copies; ++i, from += copy_step) {
        cp_async16(to + i * kCopyRows * kLine, from, exists);
      }
    }
    x_from += kTileK;
    copy_codes(tile + 1, Shared::after(stage, 1));
    // Also where there is no tile, so that the count of groups is the same in every round.
    cp_async_commit();
  };

  // The scales of the lane's rows, fetched a tile before they are wanted.
  const std::int64_t first_row = row_of(n0 + warp_row + kLaneRows * g);
  const unsigned to_second = first_row + 1 < args.rows ? static_cast<unsigned>(args.cols) : 0;
  ScaleRun run;
  run.start(args.scales, first_row * args.cols + begin);
  unsigned position = run.first;
  constexpr int kScales = kHalves ? 2 : 1;
  FetchedScale fetched[kScales][kLaneRows];
  auto fetch_tile_scales = [&](int tile) {
    const unsigned positions[kLaneRows] = {position, position + to_second};
    if (tile < tiles) fetch_scales(args.scales, run, positions, fetched[0]);
    if constexpr (kHalves) {
      constexpr unsigned kHalf = kTileK / 2;
      const unsigned others[kLaneRows] = {positions[0] + kHalf, positions[1] + kHalf};
      if (tile < full_tiles) {
        fetch_scales(args.scales, run, others, fetched[1]);
      } else {
        // Of codes that were not copied: with a scale of 0 or the offset, they are finite.
#pragma unroll
        for (int row = 0; row < kLaneRows; ++row) fetched[1][row] = {0, 0.0f};
      }
    }
    position += kTileK;
  };

  const int lane_codes = (warp_row + kLaneRows * g) * kRowCodes;
  const std::uint32_t own_bytes = 0x40u + 0x11u * t;  // of two words: byte t of each
  // Decodes the tile whose scales were fetched, and fetches those of the next.
  auto decode = [&](int tile, int stage, std::uint32_t (&a)[kSteps][4]) {
    float scales[kScales][kLaneRows];
#pragma unroll
    for (int half = 0; half < kScales; ++half) {
      finish_scales(args.scales, nested_offset, fetched[half], scales[half]);
    }
    fetch_tile_scales(tile + 1);
    const uint4* const codes = &shared.codes[stage][lane_codes];
    ScaledTable<T> tables[kLaneRows];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half < kScales) {
#pragma unroll
        for (int row = 0; row < kLaneRows; ++row) tables[row].fill(shared.table, scales[half][row]);
      }
#pragma unroll
      for (int row = 0; row < kLaneRows; ++row) {
        const uint4 words = codes[row * kRowCodes + half];
        const std::uint32_t own[2] = {permute_bytes(words.x, words.y, own_bytes),
                                      permute_bytes(words.z, words.w, own_bytes)};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          std::uint32_t pairs[2];
          tables[row].decode4(own[step], pairs);
          a[2 * half + step][row] = pairs[0];
          a[2 * half + step][2 + row] = pairs[1];
        }
      }
    }
  };

  float sum[kTileM / 2];
#pragma unroll
  for (int i = 0; i < kTileM / 2; ++i) sum[i] = 0.0f;
  std::uint32_t a[2][kSteps][4];

  copy_codes(0, 0);
#pragma unroll
  for (int tile = 0; tile < Shared::kAhead; ++tile) start_loads(tile, tile);
  fetch_tile_scales(0);
  cp_async_wait<Shared::kAhead - 1>();
  fence_async_proxy();
  __syncthreads();  // the first tile, two of codes and the table are there for all
  decode(0, 0, a[0]);
  keep(sum);

  int stage = 0;
  auto round = [&](int tile, std::uint32_t (&now)[kSteps][4], std::uint32_t (&next)[kSteps][4]) {
    const int next_stage = Shared::after(stage, 1);
    wgmma_fence(now);
    const SharedMatrix x{shared.x[stage], 0, kMatrixPiece};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) start_products<T, false>(sum, now[s], x, s);
    wgmma_commit();
    wgmma_wait<1>();  // those of the tile before, whose operands can be replaced
    start_loads(tile + Shared::kAhead, Shared::after(stage, Shared::kAhead));
    if (tile + 1 < tiles) decode(tile + 1, next_stage, next);
    cp_async_wait<Shared::kAhead - 1>();
    fence_async_proxy();
    // The next tile is there for all, and the products of the tile before this are done for all.
    __syncthreads();
    stage = next_stage;
  };
  for (int tile = 0; tile < tiles; tile += 2) {
    round(tile, a[0], a[1]);
    if (tile + 1 < tiles) round(tile + 1, a[1], a[0]);
  }
  wgmma_wait<0>();
  keep(sum);

  // Where x was, and all are done with it; so that a warp stores a row.
  float* const sums = reinterpret_cast<float*>(shared.x);
  static_assert(kTileM * kTileN * sizeof(float) <= sizeof(shared.x));
  __syncthreads();
  float* const own = sums + sum_position(2 * t, warp_row + kLaneRows * g);
#pragma unroll
  for (int i = 0; i < kTileM / 8; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      *reinterpret_cast<float2*>(own + (8 * i + e) * kTileN) =
          float2{sum[4 * i + e], sum[4 * i + 2 + e]};
    }
  }
  __syncthreads();
  const int column = 4 * lane;
  static_assert(kTileN == 4 * kWarp);
#pragma unroll 1
  for (int row = thread / kWarp; row < kTileM && m0 + row < args.m; row += kThreads / kWarp) {
    const float4 four = *reinterpret_cast<const float4*>(sums + sum_position(row, column));
    const float values[4] = {four.x, four.y, four.z, four.w};
    store_run(args.output, values, m0 + row, n0 + column);
  }
}

template <typename T, int kTileM, bool kHalves>
Status launch_tiles(const Linear4bitArgs& args, const Split& split, void* stream) {
  const std::int64_t columns = args.weight.rows;
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div(args.m, kTileM)),
                                 static_cast<unsigned>(ceil_div(columns, kTileN))),
                            kThreads, sizeof(WgmmaShared<kTileM>), stream};
  return launch_parts("linear_4bit_wgmma_kernel", linear_4bit_wgmma_kernel<T, kTileM, kHalves>,
                      config, mma_args<T>(args, split, columns), args, split, columns);
}

// Rows of x that a block takes; the same for any number where a row must not depend on others.
int tile_rows(const Linear4bitArgs& args) {
  return args.m <= 128 || args.batch_invariant ? 128 : 256;
}

template <typename T, int kTileM>
Status linear_wgmma_rows(const Linear4bitArgs& args, const Split& split, void* stream) {
  const bool halves = args.weight.block_size < kTileK || args.weight.cols % kTileK != 0;
  return halves ? launch_tiles<T, kTileM, true>(args, split, stream)
                : launch_tiles<T, kTileM, false>(args, split, stream);
}

template <typename T>
Status linear_wgmma_typed(const Linear4bitArgs& args, const Split& split, void* stream) {
  return tile_rows(args) == 128 ? linear_wgmma_rows<T, 128>(args, split, stream)
                                : linear_wgmma_rows<T, 256>(args, split, stream);
}

}  // namespace

Split linear_wgmma_split(const Linear4bitArgs& args, int processors) {
  const std::int64_t blocks =
      ceil_div(args.m, tile_rows(args)) * ceil_div(args.weight.rows, kTileN);
  return split_for_mma(args, args.weight.cols, 4 * kTileK, blocks, processors);
}

Status linear_wgmma(const Linear4bitArgs& args, const Split& split, void* stream) {
  return args.dtype == DType::kFloat16 ? linear_wgmma_typed<Float16>(args, split, stream)
                                       : linear_wgmma_typed<BFloat16>(args, split, stream);
}

}  // namespace qkern::cuda
