// dx = dy W by Hopper's products of warpgroups (sm_90a). A block takes 128 rows of dy, 64 for each
// of its two warpgroups, and 256 columns of W. It decodes each code of its tile of W once, into
// shared memory, where both warpgroups' products read it row after row; dy is their first operand
// and goes straight from memory to registers.
//
// Both orders are free, so that nothing is moved between lanes. Of the contraction: with t = lane %
// 4, a lane's 16-byte loads of dy have eight neighbouring rows of W, which are its share of two
// products. Of the columns: a lane of the decoder has 32 neighbouring codes of a row, one load and
// one scale; chunk j of what it writes (16 bytes, eight values) has their columns 2j, 2j + 1, 8 +
// 2j, 8 + 2j + 1..., so that a lane of the products gets eight neighbouring columns of four chunks.
#include "linear.cuh"
#include "ptx_hopper.h"

namespace qkern::cuda {
namespace {

constexpr int kWarpgroups = 2;
constexpr int kThreads = kWarpgroups * 4 * kWarp;
constexpr int kWarpRows = 16;  // of dy
constexpr int kTileM = kThreads / kWarp * kWarpRows;
constexpr int kTileColumns = 256;  // of W
constexpr int kDepth = 64;         // rows of W a tile
constexpr int kSteps = kDepth / 16;
constexpr int kLaneCodes = 32;  // the least block: one scale
constexpr int kChunk = 8;       // 16-bit values in 16 bytes
constexpr int kLaneChunks = kLaneCodes / kChunk;
constexpr int kLine = kMatrixLine;          // chunks: 64 columns of a row
constexpr int kPanel = kDepth * kLine;      // chunks of these columns
constexpr int kPanels = kTileColumns / 64;  // of the tile
constexpr int kBuffers = 3;                 // being read, still read by another warpgroup, filled
constexpr int kPieces = 2;                  // that a lane decodes of a tile
constexpr int kPieceRows = kDepth / kPieces;

struct DxWgmmaShared {
  uint4 w[kBuffers][kPanels * kPanel];
  CodeTable table;
};

// The row of W in the tile whose line is the `line`-th: of product line / 16, lane t's pairs of
// rows are lines 2t, 2t + 1 and 8 + 2t, 9 + 2t.
QKERN_DEVICE int row_of_line(int line) {
  return (line & 0x21) | (line & 0x18) >> 2 | (line & 0x06) << 2;
}

template <typename T>
QKERN_KERNEL(kThreads, 1)
linear_4bit_dx_wgmma_kernel(const MmaArgs<T> args) {
  QKERN_DYNAMIC_SHARED_1024(memory);
  DxWgmmaShared& shared = *reinterpret_cast<DxWgmmaShared*>(memory);
  stage_codes(args.source, shared.table);
  const float nested_offset = load_nested_offset(args.scales);

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const std::int64_t m0 = static_cast<std::int64_t>(blockIdx.x) * kTileM + warp * kWarpRows;
  const std::int64_t k0 = static_cast<std::int64_t>(blockIdx.y) * kTileColumns;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.z) * args.split_length;
  const std::int64_t end =
      begin + args.split_length < args.rows ? begin + args.split_length : args.rows;
  const int tiles = static_cast<int>((end - begin + kDepth - 1) / kDepth);
  const int full_tiles = static_cast<int>((end - begin) / kDepth);

  // Of dy a lane has rows g and g + 8 of its warp's: of a tile two pieces of each, whose rows of W
  // are 32 apart. A row past the end is the last one: its results are not stored.
  const auto dy_of = [&](std::int64_t row) {
    return args.x + (row < args.m ? row : args.m - 1) * args.x_row_stride + begin + t * kChunk;
  };
  const T* dy_from[2] = {dy_of(m0 + g), dy_of(m0 + g + 8)};
  auto load_dy = [&](int tile, std::uint32_t (&a)[kSteps][4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        // What lies past the end of the split is not read.
        const int n = tile * kDepth + piece * kPieceRows + t * kChunk;
        const bool exists = tile < full_tiles || n < end - begin;
        const uint4 values = exists ? load_global16(dy_from[row] + piece * kPieceRows) : uint4{};
        a[2 * piece][row] = values.x;
        a[2 * piece][2 + row] = values.y;
        a[2 * piece + 1][row] = values.z;
        a[2 * piece + 1][2 + row] = values.w;
      }
      dy_from[row] += kDepth;
    }
  };

  // A lane decodes half a line, 32 columns, of two rows of W. The lanes of a quarter of a warp have
  // four lines, whose chunks lie in different banks. What is past W's columns is not read: other
  // columns are decoded in its place, and the results not stored. Past the split's rows, where dy
  // is 0, codes are 0 and the scale is 0 or the offset.
  const int half = lane % 2;
  const int panel = lane / 8;
  const int line = warp * 4 + lane / 2 % 4;
  const int w_row = row_of_line(line);
  const std::int64_t column = k0 + panel * (kLine * kChunk) + half * kLaneCodes;
  std::int64_t element = (begin + w_row) * args.cols + (column < args.cols ? column : 0);
  uint4 codes[kPieces];
  FetchedScale fetched[kPieces];
  auto fetch = [&](int tile, int i) {
    const std::int64_t at = element + i * kPieceRows * args.cols;
    if (tile < full_tiles || tile * kDepth + i * kPieceRows + w_row < end - begin) {
      codes[i] = load_global16(args.packed + at / 2);
      fetched[i] = fetch_scale(args.scales, at);
    } else {
      codes[i] = uint4{0, 0, 0, 0};
      fetched[i] = {0, 0.0f};
    }
  };
  uint4* const w_to = shared.w[0] + panel * kPanel;
  // Decodes what was fetched into a buffer, and fetches of tile `next` as soon as there is room: a
  // product that waits for dy would wait for later loads as well.
  auto decode = [&](int buffer, int next) {
    element += kDepth * args.cols;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4 words = codes[i];
      const float scale = finish_scale(args.scales, nested_offset, fetched[i]);
      fetch(next, i);
      ScaledTable<T> table;
      table.fill(shared.table, scale);
      std::uint32_t pairs[4][4];  // [word][j]: columns 2j and 2j + 1 of the word
      table.decode8(words.x, pairs[0]);
      table.decode8(words.y, pairs[1]);
      table.decode8(words.z, pairs[2]);
      table.decode8(words.w, pairs[3]);
      uint4* const to = w_to + buffer * (kPanels * kPanel) + i * kPieceRows * kLine;
      static_assert(kPieceRows % 8 == 0, "chunks of both rows lie at the same places of a line");
#pragma unroll
      for (int j = 0; j < kLaneChunks; ++j) {
        store_shared16(to + line_position(line, half * kLaneChunks + j),
                       uint4{pairs[0][j], pairs[1][j], pairs[2][j], pairs[3][j]});
      }
    }
    fence_async_proxy();
  };

  float sum[kTileColumns / 2];
#pragma unroll
  for (int i = 0; i < kTileColumns / 2; ++i) sum[i] = 0.0f;
  std::uint32_t a[2][kSteps][4];

  load_dy(0, a[0]);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) fetch(0, i);
  __syncthreads();  // the table is there
  decode(0, 1);
  __syncthreads();
  keep(sum);

  int buffer = 0;
  auto round = [&](int tile, std::uint32_t (&now)[kSteps][4], std::uint32_t (&next)[kSteps][4]) {
    wgmma_fence(now);
    const SharedMatrix w{shared.w[buffer], kPanel * sizeof(uint4), kMatrixPiece};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) start_products<T, true>(sum, now[s], w, s);
    wgmma_commit();
    wgmma_wait<1>();  // those of the tile before, whose operands can be replaced
    buffer = buffer == kBuffers - 1 ? 0 : buffer + 1;
    if (tile + 1 < tiles) {
      load_dy(tile + 1, next);
      decode(buffer, tile + 2);
    }
    // The next tile is there for all, and the products of the tile before this are done for all.
    __syncthreads();
  };
  for (int tile = 0; tile < tiles; tile += 2) {
    round(tile, a[0], a[1]);
    if (tile + 1 < tiles) round(tile + 1, a[1], a[0]);
  }
  wgmma_wait<0>();
  keep(sum);

  // Of 32 columns of the tile, a lane has eight from 8t on, of its two rows.
#pragma unroll
  for (int i = 0; i < kTileColumns / 32; ++i) {
    const std::int64_t mine = k0 + 32 * i + kChunk * t;
    if (mine >= args.cols) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float eight[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) eight[j] = sum[16 * i + 4 * (j / 2) + 2 * row + j % 2];
      if (m0 + g + 8 * row < args.m) store_run(args.output, eight, m0 + g + 8 * row, mine);
    }
  }
}

template <typename T>
Status linear_dx_wgmma_typed(const Linear4bitArgs& args, const Split& split, void* stream) {
  const std::int64_t columns = args.weight.cols;
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div(args.m, kTileM)),
                                 static_cast<unsigned>(ceil_div(columns, kTileColumns))),
                            kThreads, sizeof(DxWgmmaShared), stream};
  return launch_parts("linear_4bit_dx_wgmma_kernel", linear_4bit_dx_wgmma_kernel<T>, config,
                      mma_args<T>(args, split, columns), args, split, columns);
}

}  // namespace

Split linear_dx_wgmma_split(const Linear4bitArgs& args, int processors) {
  const std::int64_t blocks = ceil_div(args.m, kTileM) * ceil_div(args.weight.cols, kTileColumns);
  return split_for_mma(args, args.weight.rows, 4 * kDepth, blocks, processors);
}

Status linear_dx_wgmma(const Linear4bitArgs& args, const Split& split, void* stream) {
  return args.dtype == DType::kFloat16 ? linear_dx_wgmma_typed<Float16>(args, split, stream)
                                       : linear_dx_wgmma_typed<BFloat16>(args, split, stream);
}

}  // namespace qkern::cuda
