// y = x W^T + bias for a few rows of x, as dot products in float32: a warp takes a few rows of W,
// its lanes 32 neighbouring codes each. A row of y depends on its row of x alone: neither the split
// nor the order of its sums follows from how many rows there are.
#include "linear.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLaneCodes = 32;  // one 128-bit load; within one block where K % 32 == 0
constexpr int kTile = kWarp * kLaneCodes;
// Offsets within a part of the contraction fit 32 bits.
constexpr std::int64_t kLongestPart = 1 << 30;

template <typename T>
constexpr int kChunkValues = 16 / static_cast<int>(sizeof(T));

// Some tiles of x in 16-byte chunks, such that the lanes' chunks j of a tile are neighbours:
// physical chunk j * 32 + (lane ^ j * 8 / kChunks). Neither the reads (fixed j) nor the writes
// (neighbouring chunks of x) conflict.
template <typename T, int kRows>
struct VectorShared {
  static constexpr int kChunks = kLaneCodes * static_cast<int>(sizeof(T)) / 16;  // of a lane
  static constexpr int kTileChunks = kChunks * kWarp;
  // So that few barriers are met, within 16 KiB, which leave room for blocks beside this one.
  static constexpr int kMaxTiles = 1024 / (kRows * kTileChunks);
  static constexpr int kTiles = kMaxTiles > 0 ? kMaxTiles : 1;

  CodeTable table;
  uint4 x[kTiles][kRows][kTileChunks];

  QKERN_DEVICE static int position(int lane, int j) {
    return j * kWarp + (lane ^ (j * (8 / kChunks)));
  }
};

template <typename T>
struct VectorArgs : Operands<T> {
  std::int64_t split_length;
  Epilogue<T> epilogue;
  T* y;
  float* parts;  // instead of y where the contraction is split
};

// Eight values of a lane from the staged tile.
template <typename T, int kRows>
QKERN_DEVICE void staged8(const VectorShared<T, kRows>& shared, int tile, int row, int lane,
                          int group, float (&out)[8]) {
  if constexpr (sizeof(T) == 2) {
    const uint4 bits = shared.x[tile][row][shared.position(lane, group)];
    unpack_pair<T>(bits.x, out + 0);
    unpack_pair<T>(bits.y, out + 2);
    unpack_pair<T>(bits.z, out + 4);
    unpack_pair<T>(bits.w, out + 6);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 bits = shared.x[tile][row][shared.position(lane, 2 * group + half)];
      out[4 * half + 0] = __uint_as_float(bits.x);
      out[4 * half + 1] = __uint_as_float(bits.y);
      out[4 * half + 2] = __uint_as_float(bits.z);
      out[4 * half + 3] = __uint_as_float(bits.w);
    }
  }
}

// One value of a lane from the staged tile.
template <typename T, int kRows>
QKERN_DEVICE float staged1(const VectorShared<T, kRows>& shared, int tile, int row, int lane,
                           int i) {
  using Shared = VectorShared<T, kRows>;
  const uint4* chunk = &shared.x[tile][row][Shared::position(lane, i / kChunkValues<T>)];
  return to_float(reinterpret_cast<const T*>(chunk)[i % kChunkValues<T>]);
}

// Copies x[row0 ..., k0 ... k0 + kTile) with zeros past the ends; kPieces: x comes in 16-byte
// pieces.
template <bool kPieces, typename T, int kRows>
QKERN_DEVICE void stage_x(const VectorArgs<T>& args, std::int64_t row0, std::int64_t k0,
                          VectorShared<T, kRows>& shared) {
  using Shared = VectorShared<T, kRows>;
  constexpr int kValues = kChunkValues<T>;
  constexpr int kTileChunks = Shared::kTileChunks;
  constexpr int kRowChunks = Shared::kTiles * kTileChunks;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kRowChunks; i += kThreads) {
    const int row = i / kRowChunks;
    const int chunk = i % kRowChunks;
    const std::int64_t k = k0 + static_cast<std::int64_t>(chunk) * kValues;
    const T* from = args.x + (row0 + row) * args.x_row_stride + k;
    uint4 bits{0, 0, 0, 0};
    if (row0 + row < args.m) {
      if constexpr (kPieces) {
        if (k < args.cols) bits = load_global16(from);
      } else {
        std::uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
          if (k + v >= args.cols) continue;
          if constexpr (sizeof(T) == 2) {
            words[v / 2] |= static_cast<std::uint32_t>(from[v].bits) << (16 * (v % 2));
          } else {
            words[v] = __float_as_uint(from[v]);
          }
        }
        bits = uint4{words[0], words[1], words[2], words[3]};
      }
    }
    const int in_tile = chunk % kTileChunks;
    shared.x[chunk / kTileChunks][row]
            [Shared::position(in_tile / Shared::kChunks, in_tile % Shared::kChunks)] = bits;
  }
}

// One result with every weight scaled before it is multiplied; all lanes of the warp call it.
template <typename T>
QKERN_DEVICE float scaled_dot(const VectorArgs<T>& args, const CodeTable& table, std::int64_t row,
                              std::int64_t n, std::int64_t begin, std::int64_t end,
                              float nested_offset, int lane) {
  float sum = 0.0f;
  for (std::int64_t k = begin + lane; k < end; k += kWarp) {
    const std::int64_t element = n * args.cols + k;
    const float scale = load_scale(args.scales, nested_offset, element);
    const float w = __fmul_rn(code_value(table, packed_code(args.packed, element)), scale);
    sum = __fmaf_rn(w, to_float(args.x[row * args.x_row_stride + k]), sum);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, step));
  }
  return sum;
}

// kWhole: every lane's 32 codes are 16 aligned bytes in one block, and x comes in 16-byte pieces.
// Otherwise rows of W start anywhere, and codes and scales are fetched one by one.
template <typename T, int kRows, int kWarpRows, bool kWhole>
QKERN_KERNEL(kThreads, 4)
linear_4bit_vector_kernel(const VectorArgs<T> args) {
  using Shared = VectorShared<T, kRows>;
  constexpr unsigned kStage = Shared::kTiles * kTile;
  QKERN_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  stage_codes(args.source, shared.table);
  const float nested_offset = load_nested_offset(args.scales);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t n0 =
      (static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kWarpRows;
  const std::int64_t row0 = static_cast<std::int64_t>(blockIdx.y) * kRows;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.z) * args.split_length;
  const std::int64_t end =
      begin + args.split_length < args.cols ? begin + args.split_length : args.cols;
  const unsigned length = static_cast<unsigned>(end - begin);

  float total[kWarpRows][kRows];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) total[r][m] = 0.0f;
  }

  // At the lane's first code of the first row of W, and from there to the other rows', which fits
  // 32 bits too. A row past the end is the last one again, unused.
  const uint4* codes = nullptr;
  ScaleRun run{};
  unsigned row_pieces[kWarpRows] = {};  // of 16 bytes
  unsigned row_position[kWarpRows] = {};
  if constexpr (kWhole) {
    const std::int64_t first = n0 < args.rows ? n0 : args.rows - 1;
    const std::int64_t element = first * args.cols + begin + lane * kLaneCodes;
    codes = reinterpret_cast<const uint4*>(args.packed) + element / kLaneCodes;
    run.start(args.scales, element);
    row_position[0] = run.first;
#pragma unroll
    for (int r = 1; r < kWarpRows; ++r) {
      const unsigned step = first + r < args.rows ? static_cast<unsigned>(args.cols) : 0;
      row_pieces[r] = row_pieces[r - 1] + step / kLaneCodes;
      row_position[r] = row_position[r - 1] + step;
    }
  }

  for (unsigned stage = 0; stage < length; stage += kStage) {
    __syncthreads();
    stage_x<kWhole>(args, row0, begin + stage, shared);
    __syncthreads();
#pragma unroll 1
    for (int tile = 0; tile < Shared::kTiles; ++tile) {
      const unsigned k0 = stage + tile * kTile;
      const unsigned k = k0 + lane * kLaneCodes;
      if (k >= length) break;
      uint4 words[kWarpRows];
      float scale[kWarpRows];
      if constexpr (kWhole) {
        unsigned positions[kWarpRows];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          words[r] = load_global16(codes + row_pieces[r]);
          positions[r] = row_position[r] + k0;
        }
        codes += kTile / kLaneCodes;
        load_scales(args.scales, run, positions, nested_offset, scale);
      }

      float sum[kWarpRows][kRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
        for (int m = 0; m < kRows; ++m) sum[r][m] = 0.0f;
      }
      if constexpr (kWhole) {
#pragma unroll
        for (int group = 0; group < kLaneCodes / 8; ++group) {
          float w[kWarpRows][8];
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            const WordOffsets offsets(group == 0   ? words[r].x
                                      : group == 1 ? words[r].y
                                      : group == 2 ? words[r].z
                                                   : words[r].w);
#pragma unroll
            for (int i = 0; i < 8; ++i) w[r][i] = offsets.value(shared.table, i);
          }
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            float x[8];
            staged8(shared, tile, m, lane, group, x);
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
              for (int i = 0; i < 8; ++i) sum[r][m] = __fmaf_rn(w[r][i], x[i], sum[r][m]);
            }
          }
        }
      } else {
        // Not unrolled: 32 copies of the address arithmetic take minutes to compile.
#pragma unroll 1
        for (int i = 0; i < kLaneCodes && k + i < length; ++i) {
          float w[kWarpRows];
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            const std::int64_t element = (n0 + r) * args.cols + begin + k + i;
            w[r] = n0 + r < args.rows
                       ? __fmul_rn(code_value(shared.table, packed_code(args.packed, element)),
                                   load_scale(args.scales, nested_offset, element))
                       : 0.0f;
          }
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            const float x = staged1(shared, tile, m, lane, i);
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) sum[r][m] = __fmaf_rn(w[r], x, sum[r][m]);
          }
        }
      }
      // The scale enters once a lane's 32 codes.
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          total[r][m] = kWhole ? __fmaf_rn(sum[r][m], scale[r], total[r][m])
                               : __fadd_rn(total[r][m], sum[r][m]);
        }
      }
    }
  }

  // Lane r * kRows + m keeps the sum for row n0 + r of W and row m of x.
  static_assert(kWarpRows * kRows <= kWarp, "a lane for each result");
  float mine = 0.0f;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      float value = total[r][m];
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
        value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, step));
      }
      if (lane == r * kRows + m) mine = value;
    }
  }
  if constexpr (kWhole) {
    // Sums of unscaled products leave float32 before the result does, where x is near its end.
#pragma unroll 1
    for (int i = 0; i < kWarpRows * kRows; ++i) {
      const bool finite = magnitude_bits(__shfl_sync(kAllLanes, mine, i)) < kInfBits;
      const std::int64_t row = row0 + i % kRows;
      const std::int64_t n = n0 + i / kRows;
      if (finite || row >= args.m || n >= args.rows) continue;
      const float again = scaled_dot(args, shared.table, row, n, begin, end, nested_offset, lane);
      if (lane == i) mine = again;
    }
  }
  const std::int64_t n = n0 + lane / kRows;
  const std::int64_t row = row0 + lane % kRows;
  if (lane >= kWarpRows * kRows || n >= args.rows || row >= args.m) return;
  if (args.parts != nullptr) {
    args.parts[(blockIdx.z * args.m + row) * args.rows + n] = mine;
  } else {
    args.y[row * args.rows + n] = from_float<T>(args.epilogue(mine, row, n));
  }
}

template <typename T, int kRows, int kWarpRows, bool kWhole>
Status launch_rows(const Linear4bitArgs& args, const Split& split, void* stream) {
  const std::int64_t columns = args.weight.rows;
  const VectorArgs<T> launch_args{operands_of<T>(args),
                                  split.length,
                                  {static_cast<const T*>(args.bias)},
                                  static_cast<T*>(args.y),
                                  split.count > 1 ? args.workspace : nullptr};
  const LaunchConfig config{dim3(static_cast<unsigned>(ceil_div(columns, kWarps * kWarpRows)),
                                 static_cast<unsigned>(ceil_div(args.m, kRows))),
                            kThreads, sizeof(VectorShared<T, kRows>), stream};
  return launch_parts("linear_4bit_vector_kernel",
                      linear_4bit_vector_kernel<T, kRows, kWarpRows, kWhole>, config, launch_args,
                      args, split, columns);
}

}  // namespace

Split linear_vector_split(const Linear4bitArgs& args) {
  constexpr std::int64_t kWanted = 512;  // blocks: about four for each of a large GPU's processors
  constexpr std::int64_t kBlockRows = 16;
  constexpr int kMaxParts = 16;
  return split_for(args.weight.cols, kTile, ceil_div(args.weight.rows, kBlockRows), kWanted,
                   kMaxParts, ceil_div(args.weight.cols, kLongestPart));
}

Status linear_vector(const Linear4bitArgs& args, const Split& split, void* stream) {
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto in_pieces = [](const void* p) {
      return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
    };
    const bool whole = args.weight.cols % kLaneCodes == 0 && in_pieces(args.weight.packed) &&
                       args.weight.cols <= kLongestRow && in_pieces(args.x) &&
                       args.x_row_stride * sizeof(T) % 16 == 0;
    Linear4bitArgs some = args;
    for (std::int64_t row = 0; row < args.m; row += kVectorLaunchRows) {
      some.x = static_cast<const T*>(args.x) + row * args.x_row_stride;
      some.y = static_cast<T*>(args.y) + row * args.weight.rows;
      some.m = args.m - row < kVectorLaunchRows ? args.m - row : kVectorLaunchRows;
      Status status;
      if (!whole) {
        // One kernel for any number of rows: such shapes are rare.
        status = launch_rows<T, 4, 4, false>(some, split, stream);
      } else if (some.m == 1) {
        status = launch_rows<T, 1, 4, true>(some, split, stream);
      } else if (some.m == 2) {
        status = launch_rows<T, 2, 4, true>(some, split, stream);
      } else if (some.m <= 4) {
        status = launch_rows<T, 4, 4, true>(some, split, stream);
      } else {
        status = launch_rows<T, 8, 2, true>(some, split, stream);
      }
      if (!status.ok()) return status;
    }
    return Status::success();
  });
}

}  // namespace qkern::cuda
