// Products of warpgroups.
#include "selftest.h"

#include <cstring>
#include <random>
#include <vector>

namespace selftest {
namespace {

constexpr int kDepth = 64;  // of a tile: a line of shared memory
constexpr int kStep = 16;
constexpr int kSteps = kDepth / kStep;
constexpr int kRows = 64;  // of a warpgroup
constexpr unsigned kPiece = 1024;

// c + a b, of small integers, b and c of float16 times a power of two that makes some of b
// subnormal: every sum is exact, so the result has one right value whatever the order of summation.
template <typename T>
struct Problem {
  int rows, columns, depth;
  std::vector<float> a, b, c, d;  // row after row

  Problem(int rows_, int columns_, int depth_) : rows(rows_), columns(columns_), depth(depth_) {
    std::mt19937 generator(11);
    const auto fill = [&](std::vector<float>& matrix, int size, float unit) {
      for (int i = 0; i < size; ++i) {
        matrix.push_back(unit * static_cast<float>(static_cast<int>(generator() % 31) - 15));
      }
    };
    const float unit = std::is_same_v<T, Float16> ? 0x1p-17f : 1.0f;
    fill(a, rows * depth, 1.0f);
    fill(b, depth * columns, unit);
    fill(c, rows * columns, unit);
    d = c;
    for (int m = 0; m < rows; ++m) {
      for (int k = 0; k < depth; ++k) {
        for (int n = 0; n < columns; ++n) d[at(m, n)] += a[m * depth + k] * b[at(k, n)];
      }
    }
  }
  std::size_t at(int row, int column) const {
    return static_cast<std::size_t>(row * columns + column);
  }
  // Two neighbouring values of a row of a in a register.
  std::uint32_t a_pair(int row, int column) const {
    const float* pair = &a[static_cast<std::size_t>(row * depth + column)];
    return encode<T>(pair[0]) | static_cast<std::uint32_t>(encode<T>(pair[1])) << 16;
  }
};

// The fields of PTX's matrix descriptor.
std::uint64_t describe(std::uint32_t address, std::uint64_t leading, std::uint64_t stride) {
  return address / 16 + (leading / 16 << 16) + (stride / 16 << 32) + (std::uint64_t{1} << 62);
}

// A thread's values of a, for the 16 columns from `column` on, and of c or d.
template <typename T>
void load_a(const Problem<T>& problem, int first_row, int column, std::uint32_t (&a)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = first_row + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  column += lane % 4 * 2;
  a[0] = problem.a_pair(row, column);
  a[1] = problem.a_pair(row + 8, column);
  a[2] = problem.a_pair(row, column + 8);
  a[3] = problem.a_pair(row + 8, column + 8);
}

template <int kValues, typename Visit>
void for_each_sum(int first_row, const Visit& visit) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = first_row + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  for (int i = 0; i < kValues; i += 4) {
    const int column = i * 2 + lane % 4 * 2;
    visit(i, row, column);
    visit(i + 1, row, column + 1);
    visit(i + 2, row + 8, column);
    visit(i + 3, row + 8, column + 1);
  }
}

enum class Mistake {
  kNone,
  kNoFence,
  kWrittenAfterFence,
  kNoProxyFence,
  kNoBarrier,
  kReadBeforeWait,
  kOneWarp,
  kDescriptors,
  kLanes,
  kStride,
  kLayout,
  kBeyond,
  kUnaligned,
};

// One tile. Where b lies: column after column, a line of 128 bytes each, or row after row, 64
// columns to a line. Eight lines are a piece, in which the 16 bytes at place p of line l are those
// of place p ^ l.
template <typename T, bool kTransposed, int kValues, Mistake kMistake>
void tile_kernel(const Problem<T>& problem, unsigned leading, unsigned stride, float* out) {
  constexpr int kColumns = 2 * kValues;
  QKERN_DYNAMIC_SHARED_1024(aligned);
  unsigned char* memory = aligned;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int first_row = thread / 128 * kRows;

  for (int i = thread; i < kDepth * kColumns / 8; i += threads) {
    std::uint16_t values[8];
    unsigned line, place, piece;
    if (kTransposed) {
      const int k = i % kDepth;
      const int n = i / kDepth * 8;
      for (int j = 0; j < 8; ++j) values[j] = encode<T>(problem.b[problem.at(k, n + j)]);
      line = k % 8;
      place = n / 8 % 8;
      piece = n / 64 * leading + k / 8 * stride;
    } else {
      const int n = i % kColumns;
      const int k = i / kColumns * 8;
      for (int j = 0; j < 8; ++j) values[j] = encode<T>(problem.b[problem.at(k + j, n)]);
      line = n % 8;
      place = k / 8;
      piece = n / 8 * stride;
    }
    uint4 packed;
    std::memcpy(&packed, values, sizeof packed);
    cuda::store_shared16(memory + piece + line * 128 + (place ^ line) * 16, packed);
  }
  if (kMistake != Mistake::kNoProxyFence) cuda::fence_async_proxy();
  if (kMistake != Mistake::kNoBarrier) __syncthreads();

  if (kMistake == Mistake::kOneWarp && thread >= 32) return;
  float sums[kValues];
  for_each_sum<kValues>(
      first_row, [&](int i, int row, int column) { sums[i] = problem.c[problem.at(row, column)]; });
  std::uint32_t a[kSteps][4];
  for (int s = 0; s < kSteps; ++s) load_a(problem, first_row, s * kStep, a[s]);
  cuda::keep(sums);
  if (kMistake != Mistake::kNoFence) cuda::wgmma_fence(a);
  if (kMistake == Mistake::kWrittenAfterFence) a[2][1] ^= 1;
  std::uint32_t address = cuda::shared_address(memory);
  if (kMistake == Mistake::kUnaligned) address += 16;
  if (kMistake == Mistake::kDescriptors && thread / 32 == 1) address += 32;
  if (kMistake == Mistake::kLanes && thread % 32 == 5) address += 32;
  if (kMistake == Mistake::kStride) stride += 512;
  if (kMistake == Mistake::kBeyond) stride += kPiece;
  for (int s = 0; s < kSteps; ++s) {
    const std::uint32_t start = address + s * (kTransposed ? 2 * stride : kStep * 2);
    std::uint64_t b = describe(start, leading, stride);
    if (kMistake == Mistake::kLayout) b ^= std::uint64_t{3} << 62;
    cuda::wgmma_64xNx16<T, kTransposed>(sums, a[s], b);
  }
  cuda::wgmma_commit();
  const auto store = [&] {
    for_each_sum<kValues>(
        first_row, [&](int i, int row, int column) { out[problem.at(row, column)] = sums[i]; });
  };
  if (kMistake == Mistake::kReadBeforeWait) store();
  cuda::wgmma_wait<0>();
  cuda::keep(sums);
  if (kMistake != Mistake::kReadBeforeWait) store();
}

// Two warpgroups with the same b. The pieces of each of the two directions lie apart once.
template <typename T, bool kTransposed, int kValues, Mistake kMistake = Mistake::kNone>
std::string tile() {
  constexpr int kColumns = 2 * kValues;
  const Problem<T> problem(2 * kRows, kColumns, kDepth);
  unsigned leading = 0;
  unsigned stride = kValues == 64 ? 2 * kPiece : kPiece;
  std::size_t bytes = kColumns / 8 * stride;
  if (kTransposed) {
    leading = kValues == 64 ? kPiece : kDepth / 8 * kPiece;
    stride = kValues == 64 ? kColumns / 64 * kPiece : kPiece;
    bytes = kColumns * kDepth * sizeof(T);
  }
  Buffer<float> out(problem.d.size());
  const char* failure = emulator::launch(dim3(1), dim3(256), bytes, [&] {
    tile_kernel<T, kTransposed, kValues, kMistake>(problem, leading, stride, out.get());
  });
  return outcome(failure, std::memcmp(out.get(), problem.d.data(), out.size * sizeof(float)) == 0);
}

template <Mistake kMistake>
std::string tile_with() {
  return tile<Float16, false, 64, kMistake>();
}

enum class Fence { kAfterCopy, kBeforeWait };

// A tile is copied while the products of the one before run, which take until the next round's
// wait.
template <int kStages, int kOperands, bool kTrailingBarrier, Fence kFence>
void tiles_kernel(const Problem<BFloat16>& problem, const std::uint16_t* columns, float* out) {
  constexpr int kValues = 64;
  constexpr int kColumns = 2 * kValues;
  QKERN_DYNAMIC_SHARED_1024(memory);
  float sums[kValues] = {};
  std::uint32_t a[kOperands][kSteps][4];
  for (int tile = 0; tile < problem.depth / kDepth; ++tile) {
    const int first = tile * kDepth;
    unsigned char* const stage = memory + tile % kStages * kColumns * 128;
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * 8; i += 128) {
      const int line = i / 8;
      cuda::cp_async16(stage + line * 128 + ((i ^ line) % 8) * 16,
                       columns + line * problem.depth + first + i % 8 * 8, true);
    }
    cuda::cp_async_commit();
    for (int s = 0; s < kSteps; ++s) {
      load_a(problem, 0, first + s * kStep, a[tile % kOperands][s]);
    }
    if (kFence == Fence::kBeforeWait) cuda::fence_async_proxy();
    cuda::cp_async_wait<0>();
    if (kFence == Fence::kAfterCopy) cuda::fence_async_proxy();
    __syncthreads();
    cuda::wgmma_fence(a[tile % kOperands]);
    for (int s = 0; s < kSteps; ++s) {
      const std::uint32_t start = cuda::shared_address(stage) + s * kStep * 2;
      cuda::wgmma_64xNx16<BFloat16, false>(sums, a[tile % kOperands][s],
                                           describe(start, 0, kPiece));
    }
    cuda::wgmma_commit();
    cuda::wgmma_wait<1>();
    if (kTrailingBarrier) __syncthreads();
  }
  cuda::wgmma_wait<0>();
  cuda::keep(sums);
  for_each_sum<kValues>(0, [&](int i, int row, int column) {
    out[problem.at(row, column)] = sums[i] + problem.c[problem.at(row, column)];
  });
}

template <int kStages = 2, int kOperands = 2, bool kTrailingBarrier = true,
          Fence kFence = Fence::kAfterCopy>
std::string tiles() {
  const Problem<BFloat16> problem(kRows, 128, 5 * kDepth);
  Buffer<std::uint16_t> columns(problem.b.size());
  for (int k = 0; k < problem.depth; ++k) {
    for (int n = 0; n < problem.columns; ++n) {
      columns[n * problem.depth + k] = encode<BFloat16>(problem.b[problem.at(k, n)]);
    }
  }
  Buffer<float> out(problem.d.size());
  const char* failure = emulator::launch(dim3(1), dim3(128), kStages * 128 * 128, [&] {
    tiles_kernel<kStages, kOperands, kTrailingBarrier, kFence>(problem, columns.get(), out.get());
  });
  return outcome(failure, std::memcmp(out.get(), problem.d.data(), out.size * sizeof(float)) == 0);
}

// Memory of which the kernel does not say that it is aligned to 1024 bytes.
std::string undeclared_alignment() {
  return outcome(emulator::launch(dim3(1), dim3(128), 16 * kPiece,
                                  [] {
                                    QKERN_DYNAMIC_SHARED(memory);
                                    float sums[64] = {};
                                    std::uint32_t a[1][4] = {};
                                    cuda::wgmma_fence(a);
                                    cuda::wgmma_64xNx16<Float16, false>(
                                        sums, a[0],
                                        describe(cuda::shared_address(memory), 0, kPiece));
                                  }),
                 true);
}

std::string part_of_a_warpgroup() {
  return run(96, [] { cuda::wgmma_commit(); });
}

std::string address_outside_shared() {
  return run(32, [] {
    float own = 0;
    cuda::shared_address(&own);
  });
}

}  // namespace

Tests warpgroups() {
  return {
      {"product_128_f16", tile<Float16, false, 64>},
      {"product_128_bf16", tile<BFloat16, false, 64>},
      {"product_256_f16", tile<Float16, false, 128>},
      {"product_256_bf16", tile<BFloat16, false, 128>},
      {"product_128_f16_transposed", tile<Float16, true, 64>},
      {"product_128_bf16_transposed", tile<BFloat16, true, 64>},
      {"product_256_f16_transposed", tile<Float16, true, 128>},
      {"product_256_bf16_transposed", tile<BFloat16, true, 128>},
      {"product_without_fence", tile_with<Mistake::kNoFence>},
      {"product_written_after_fence", tile_with<Mistake::kWrittenAfterFence>},
      {"product_without_proxy_fence", tile_with<Mistake::kNoProxyFence>},
      {"product_without_barrier", tile_with<Mistake::kNoBarrier>},
      {"product_read_before_wait", tile_with<Mistake::kReadBeforeWait>},
      {"product_of_one_warp", tile_with<Mistake::kOneWarp>},
      {"product_descriptors_of_warps", tile_with<Mistake::kDescriptors>},
      {"product_descriptors_of_lanes", tile_with<Mistake::kLanes>},
      {"product_stride", tile_with<Mistake::kStride>},
      {"product_layout", tile_with<Mistake::kLayout>},
      {"product_beyond_shared", tile_with<Mistake::kBeyond>},
      {"product_unaligned", tile_with<Mistake::kUnaligned>},
      {"product_undeclared_alignment", undeclared_alignment},
      {"product_part_of_a_warpgroup", part_of_a_warpgroup},
      {"address_outside_shared", address_outside_shared},
      {"products_in_flight", tiles<>},
      {"products_one_stage", tiles<1>},
      {"products_one_operand", tiles<2, 1>},
      {"products_without_trailing_barrier", tiles<2, 2, false>},
      {"products_fence_before_wait", tiles<2, 2, true, Fence::kBeforeWait>},
  };
}

}  // namespace selftest
