// dx = dy W on tensor cores. A block takes kTileM rows of dy and 128 columns of W; its warps split
// the columns, so each code is decoded once a block, straight into a fragment.
//
// The contraction runs down W's rows, so a fragment's register pairs codes of two rows. Lane (g,
// t), g = lane / 4 and t = lane % 4, takes rows 8t...8t+7 of 32 (dy is read in the same order) and
// in each the four neighbouring codes 4g...4g+3: one 16-bit load. W is the mma's first operand:
// rows g and g + 8 of fragment f are the warp's columns 4g + 2f and 4g + 2f + 1, which leaves a
// lane with neighbouring results. Rounding packs the two rows' products, so no transpose is needed.
#include "linear.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFragments = 2;                  // 16 columns each, of a warp
constexpr int kLaneCodes = 2 * kFragments;     // of a row of W
constexpr int kWarpColumns = 16 * kFragments;  // the least block: one scale a row and warp
constexpr int kTileColumns = kWarpColumns * kWarps;
constexpr int kTileDepth = 64;  // rows of W
constexpr int kChunk = 8;       // 16-bit values in 16 bytes
constexpr int kRowChunks = kTileDepth / kChunk;

template <int kTileM, int kStages>
struct DxShared {
  CodeTable table;
  uint4 dy[kStages][kTileM * kRowChunks];
  uint4 codes[kStages][kTileDepth * kWarps];  // 16 bytes a row and warp
  float scales[2][kWarps][kTileDepth];
};

// Rows of one parity share banks, so odd rows swap the two halves of 32: a read (two rows, four t)
// meets eight different groups of banks.
QKERN_DEVICE int dy_position(int row, int t, int half) {
  return row * kRowChunks + ((half ^ (row & 1)) << 2 | t);
}

// The lanes' rows are eight apart, which is the same bank: the warps' chunks rotate instead.
QKERN_DEVICE int code_position(int row, int warp) {
  return row * kWarps + (warp ^ ((row >> 3) & 3));
}

template <typename T, int kTileM, int kStages>
QKERN_KERNEL(kThreads, 2)
linear_4bit_dx_mma_kernel(const MmaArgs<T> args) {
  using Shared = DxShared<kTileM, kStages>;
  QKERN_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  stage_codes(args.source, shared.table);
  const float nested_offset = load_nested_offset(args.scales);

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const std::int64_t m0 = static_cast<std::int64_t>(blockIdx.x) * kTileM;
  const std::int64_t k0 = static_cast<std::int64_t>(blockIdx.y) * kTileColumns;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.z) * args.split_length;
  const std::int64_t end =
      begin + args.split_length < args.rows ? begin + args.split_length : args.rows;
  const int tiles = static_cast<int>((end - begin + kTileDepth - 1) / kTileDepth);

  // A thread copies the same chunk of every kCopyRows-th row of dy, and a warp's 16 bytes of every
  // kCopyDepth-th row of W; from where, moves on with each tile.
  constexpr int kCopyRows = kThreads / kRowChunks;
  constexpr int kCopyDepth = kThreads / kWarps;
  const int dy_row = thread / kRowChunks;
  const int dy_chunk = thread % kRowChunks;
  const T* dy_from = args.x + (m0 + dy_row) * args.x_row_stride + begin + dy_chunk * kChunk;
  const int dy_to = dy_position(dy_row, dy_chunk % 4, dy_chunk / 4);
  static_assert(kCopyRows % 2 == 0, "dy_position of copied rows differs by whole rows");
  const int code_row = thread / kWarps;
  const std::int64_t code_column = k0 + thread % kWarps * kWarpColumns;
  const std::uint8_t* codes_from = args.packed + ((begin + code_row) * args.cols + code_column) / 2;
  const int codes_to = code_position(code_row, thread % kWarps);
  static_assert(kCopyDepth % 32 == 0, "code_position of copied rows differs by whole rows");
  // Tiles within W and the split, and blocks within dy, which are nearly all, ask nothing of rows.
  const int full_tiles =
      k0 + kTileColumns <= args.cols ? static_cast<int>((end - begin) / kTileDepth) : 0;
  const int whole_tiles = m0 + kTileM <= args.m ? full_tiles : 0;

  // Called for one tile after the other.
  int fill_stage = 0;
  auto start_loads = [&](int tile) {
    const int stage = fill_stage;
    fill_stage = fill_stage == kStages - 1 ? 0 : fill_stage + 1;
    const T* dy = dy_from;
    const std::uint8_t* codes = codes_from;
    if (tile < whole_tiles) {
#pragma unroll
      for (int i = 0; i < kTileM / kCopyRows; ++i) {
        cp_async16(&shared.dy[stage][dy_to + i * kCopyRows * kRowChunks], dy, true);
        dy += kCopyRows * args.x_row_stride;
      }
#pragma unroll
      for (int i = 0; i < kTileDepth / kCopyDepth; ++i) {
        cp_async16(&shared.codes[stage][codes_to + i * kCopyDepth * kWarps], codes, true);
        codes += kCopyDepth / 2 * args.cols;
      }
    } else if (tile < tiles) {
      const std::int64_t n0 = begin + static_cast<std::int64_t>(tile) * kTileDepth;
#pragma unroll
      for (int i = 0; i < kTileM / kCopyRows; ++i) {
        const bool exists = m0 + dy_row + i * kCopyRows < args.m && n0 + dy_chunk * kChunk < end;
        cp_async16(&shared.dy[stage][dy_to + i * kCopyRows * kRowChunks], exists ? dy : args.x,
                   exists);
        dy += kCopyRows * args.x_row_stride;
      }
#pragma unroll
      for (int i = 0; i < kTileDepth / kCopyDepth; ++i) {
        const bool exists = n0 + code_row + i * kCopyDepth < end && code_column < args.cols;
        cp_async16(&shared.codes[stage][codes_to + i * kCopyDepth * kWarps],
                   exists ? codes : args.packed, exists);
        codes += kCopyDepth / 2 * args.cols;
      }
    }
    dy_from += kTileDepth;
    codes_from += kTileDepth / 2 * args.cols;
    // Also where there is no tile, so that the count of groups is the same in every round.
    cp_async_commit();
  };
  // Each lane fetches the scales of two rows for its warp's columns before the products of a tile,
  // one tile after the other, and finishes and stores them after those. Where there are no weights,
  // the scale is 0 or the offset: dy is 0 there, or the result is not stored.
  const std::int64_t scale_column = k0 + warp * kWarpColumns;
  std::int64_t scale_element = (begin + lane) * args.cols + scale_column;
  FetchedScale fetched[2];
  auto fetch_tile_scales = [&](int tile) {
    const std::int64_t later = kWarp * args.cols;
    if (tile < full_tiles) {
#pragma unroll
      for (int i = 0; i < 2; ++i) fetched[i] = fetch_scale(args.scales, scale_element + i * later);
    } else {
      const std::int64_t n = begin + static_cast<std::int64_t>(tile) * kTileDepth + lane;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        fetched[i] = {0, 0.0f};
        if (n + i * kWarp < end && scale_column < args.cols) {
          fetched[i] = fetch_scale(args.scales, scale_element + i * later);
        }
      }
    }
    scale_element += kTileDepth * args.cols;
  };
  auto store_tile_scales = [&](int tile) {
    float finished[2];
    finish_scales(args.scales, nested_offset, fetched, finished);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shared.scales[tile % 2][warp][i * kWarp + lane] = finished[i];
    }
  };

  constexpr int kFragmentsM = kTileM / 8;
  float sum[kFragmentsM][kFragments][4];
  clear(sum);

#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) start_loads(tile);
  fetch_tile_scales(0);
  store_tile_scales(0);

  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    // This tile is there for all, and all are done with the stage that is filled next.
    __syncthreads();
    start_loads(tile + kStages - 1);
    fetch_tile_scales(tile + 1);

    const uint4* const dy_tile = shared.dy[stage];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Read last before this round's barrier, and next after the following one.
      if (half == 1) store_tile_scales(tile + 1);
      const int row0 = 32 * half + 8 * t;
      float scales[8];
      const auto* row_scales = reinterpret_cast<const uint4*>(&shared.scales[tile % 2][warp][row0]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 bits = row_scales[i];
        scales[4 * i + 0] = __uint_as_float(bits.x);
        scales[4 * i + 1] = __uint_as_float(bits.y);
        scales[4 * i + 2] = __uint_as_float(bits.z);
        scales[4 * i + 3] = __uint_as_float(bits.w);
      }
      // Two steps of four rows, as two pairs; w[step][pair][c] is column 4g + c.
      std::uint32_t w[2][2][kLaneCodes];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        // The codes of two rows as those of one word.
        std::uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto* chunk = reinterpret_cast<const std::uint16_t*>(
              &shared.codes[stage][code_position(row0 + 2 * pair + i, warp)]);
          word += static_cast<std::uint32_t>(chunk[g]) << (16 * i);
        }
        const WordOffsets offsets(word);
#pragma unroll
        for (int c = 0; c < kLaneCodes; ++c) {
          w[pair / 2][pair % 2][c] = pack_pair<T>(
              __fmul_rn(offsets.value(shared.table, c), scales[2 * pair]),
              __fmul_rn(offsets.value(shared.table, kLaneCodes + c), scales[2 * pair + 1]));
        }
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
        const uint4 values = dy_tile[dy_position(g, t, half) + 8 * i * kRowChunks];
        const std::uint32_t dy[2][2] = {{values.x, values.y}, {values.z, values.w}};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            const std::uint32_t columns[4] = {w[step][0][2 * f], w[step][0][2 * f + 1],
                                              w[step][1][2 * f], w[step][1][2 * f + 1]};
            mma_16x8x16<T>(sum[i][f], columns, dy[step]);
          }
        }
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

  const std::int64_t column = k0 + warp * kWarpColumns;
  if (column >= args.cols) return;
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
    store_fragments(args.output, sum[i], m0 + 8 * i, column, lane);
  }
}

constexpr int kTileM = 64;
constexpr int kStages = 3;

template <typename T>
Status launch_tiles(const Linear4bitArgs& args, const Split& split, void* stream) {
  const std::int64_t columns = args.weight.cols;
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div(args.m, kTileM)),
                                 static_cast<unsigned>(ceil_div(columns, kTileColumns))),
                            kThreads, sizeof(DxShared<kTileM, kStages>), stream};
  return launch_parts("linear_4bit_dx_mma_kernel", linear_4bit_dx_mma_kernel<T, kTileM, kStages>,
                      config, mma_args<T>(args, split, columns), args, split, columns);
}

}  // namespace

Split linear_dx_mma_split(const Linear4bitArgs& args) {
  const std::int64_t blocks = ceil_div(args.m, kTileM) * ceil_div(args.weight.cols, kTileColumns);
  return split_for_mma(args, args.weight.rows, 8 * kTileDepth, blocks);
}

Status linear_dx_mma(const Linear4bitArgs& args, const Split& split, void* stream) {
  return args.dtype == DType::kFloat16 ? launch_tiles<Float16>(args, split, stream)
                                       : launch_tiles<BFloat16>(args, split, stream);
}

}  // namespace qkern::cuda
