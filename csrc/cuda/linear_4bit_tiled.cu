// The matmuls that no tensor core serves (float32 activations, bfloat16 before sm_80) or whose
// shapes do not divide (K % 32, N % 8): float32 tiles, any shape, one element at a time.
#include "groups.cuh"

namespace qkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileM = 64;
constexpr int kTileN = 64;   // columns of the result
constexpr int kDepth = 32;   // of the contraction
constexpr int kThreadM = 4;  // results of a thread
constexpr int kThreadN = 4;
// A sum restarts after so many products and joins a second one: the rounding error of a chain of
// additions grows with its length.
constexpr int kChain = 256;
static_assert(kChain % kDepth == 0, "chains end with a tile");

struct TiledShared {
  CodeTable table;
  // Transposed, so that a thread reads neighbours; the padding keeps the transposing writes of a
  // warp in different banks.
  float x[kDepth][kTileM + 1];
  float w[kDepth][kTileN + 1];
};

template <typename T>
struct TiledArgs : Operands<T> {
  Epilogue<T> epilogue;
  T* y;
};

// y = x W^T + bias, or y = x W where kInputGradient.
template <typename T, bool kInputGradient>
QKERN_DEVICE void multiply_tile(const TiledArgs<T>& args, const Tile& place) {
  QKERN_SHARED(TiledShared, shared);
  stage_codes(args.source, shared.table);
  const float nested_offset = load_nested_offset(args.scales);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t m0 = place.row0;
  const std::int64_t n0 = place.columns * kTileN;
  const std::int64_t depth = kInputGradient ? args.rows : args.cols;
  const std::int64_t columns = kInputGradient ? args.cols : args.rows;
  const int thread_m = thread / (kTileN / kThreadN);
  const int thread_n = thread % (kTileN / kThreadN);

  float total[kThreadM][kThreadN];
  float sum[kThreadM][kThreadN];
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadN; ++j) total[i][j] = sum[i][j] = 0.0f;
  }
  for (std::int64_t d0 = 0; d0 < depth; d0 += kDepth) {
    __syncthreads();
    for (int i = thread; i < kTileM * kDepth; i += kThreads) {
      const std::int64_t row = m0 + i / kDepth;
      const std::int64_t d = d0 + i % kDepth;
      const bool exists = row < args.m && d < depth;
      shared.x[i % kDepth][i / kDepth] =
          exists ? to_float(args.x[row * args.x_row_stride + d]) : 0.0f;
    }
    for (int i = thread; i < kTileN * kDepth; i += kThreads) {
      // Neighbouring threads read neighbouring codes of a row of W.
      const int column = kInputGradient ? i % kTileN : i / kDepth;
      const int d = kInputGradient ? i / kTileN : i % kDepth;
      float value = 0.0f;
      if (n0 + column < columns && d0 + d < depth) {
        const std::int64_t element = kInputGradient ? (d0 + d) * args.cols + n0 + column
                                                    : (n0 + column) * args.cols + d0 + d;
        value = __fmul_rn(code_value(shared.table, packed_code(args.packed, element)),
                          load_scale(args.scales, nested_offset, element));
      }
      shared.w[d][column] = value;
    }
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kDepth; ++d) {
      float x[kThreadM];
      float w[kThreadN];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) x[i] = shared.x[d][thread_m * kThreadM + i];
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) w[j] = shared.w[d][thread_n + j * (kTileN / kThreadN)];
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) sum[i][j] = __fmaf_rn(x[i], w[j], sum[i][j]);
      }
    }
    if ((d0 + kDepth) % kChain != 0 && d0 + kDepth < depth) continue;
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) {
        total[i][j] = __fadd_rn(total[i][j], sum[i][j]);
        sum[i][j] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadN; ++j) {
      const std::int64_t row = m0 + thread_m * kThreadM + i;
      const std::int64_t column = n0 + thread_n + j * (kTileN / kThreadN);
      if (row >= args.m || column >= columns) continue;
      args.y[row * columns + column] = from_float<T>(args.epilogue(total[i][j], row, column));
    }
  }
}

template <typename T, bool kInputGradient>
QKERN_KERNEL(kThreads, 2)
linear_4bit_tiled_kernel(const TiledArgs<T> args) {
  multiply_tile<T, kInputGradient>(args, this_tile(kTileM));
}

template <typename T, bool kInputGradient>
QKERN_KERNEL(kThreads, 2)
grouped_linear_4bit_tiled_kernel(const Grouped<TiledArgs<T>> args) {
  const std::int64_t columns = kInputGradient ? args.all.cols : args.all.rows;
  TiledArgs<T> own = args.all;
  Tile tile;
  if (take_tile<kTileM>(args, columns, own, own.y, own.epilogue, tile)) {
    multiply_tile<T, kInputGradient>(own, tile);
  }
}

template <typename T>
TiledArgs<T> tiled_args(const Linear4bitArgs& args) {
  return {operands_of<T>(args), {static_cast<const T*>(args.bias)}, static_cast<T*>(args.y)};
}

LaunchConfig tiled_config(std::int64_t row_tiles, std::int64_t columns, void* stream) {
  return {dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(ceil_div(columns, kTileN))),
          kThreads, 0, stream};
}

}  // namespace

Status linear_tiled(const Linear4bitArgs& args, bool input_gradient, void* stream) {
  const std::int64_t columns = input_gradient ? args.weight.cols : args.weight.rows;
  const LaunchConfig config = tiled_config(ceil_div(args.m, kTileM), columns, stream);
  return with_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel =
        input_gradient ? linear_4bit_tiled_kernel<T, true> : linear_4bit_tiled_kernel<T, false>;
    return launch("linear_4bit_tiled_kernel", kernel, config, tiled_args<T>(args));
  });
}

Status grouped_linear_tiled(const GroupedLinear4bitArgs& args, bool input_gradient, void* stream) {
  const Weight4bit& weight = args.all.weight;
  const std::int64_t columns = input_gradient ? weight.cols : weight.rows;
  const LaunchConfig config = tiled_config(grouped_tiles(args, kTileM), columns, stream);
  return with_dtype(args.all.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = input_gradient ? grouped_linear_4bit_tiled_kernel<T, true>
                                       : grouped_linear_4bit_tiled_kernel<T, false>;
    return launch("grouped_linear_4bit_tiled_kernel", kernel, config,
                  grouped(args, tiled_args<T>(args.all)));
  });
}

}  // namespace qkern::cuda
