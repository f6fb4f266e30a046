// The instructions of sm_90a alone: products of a warpgroup, four warps, which read one operand
// from shared memory while the threads go on. As ptx.h: the emulator brings its own bodies.
//
// Shared memory is read by another way (PTX's async proxy) than the one by which threads write it.
// So who writes it, by store_shared16 or cp_async16, calls fence_async_proxy before the barrier
// behind which the products start; a copy is waited for before. Registers that products read or add
// to are in flight from the call to the wait for its group.
#pragma once

#include "ptx.h"

#ifdef QKERN_CUDA_EMULATED
#include "cuda_emulator_ptx_hopper.h"
#else
namespace qkern::cuda {

// Where `shared` lies, as instructions of shared memory take it.
QKERN_DEVICE std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes to shared memory; `p` is 16-aligned.
QKERN_DEVICE void store_shared16(void* p, uint4 value) { *static_cast<uint4*>(p) = value; }

// What this thread has written to shared memory can be read by products.
QKERN_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// The registers of `values` are what they are here: the compiler moves no use of them across.
template <int kValues>
QKERN_DEVICE void keep(float (&values)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Products that start after this read `a` as it is here. All threads of the warpgroup call it after
// they have written `a`, or what products add to.
template <int kSteps>
QKERN_DEVICE void wgmma_fence(std::uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[s][i])::"memory");
  }
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Closes the group of the warpgroup's products since the last commit.
QKERN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending of the youngest groups are unfinished.
template <int kPending>
QKERN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

#define QKERN_WGMMA_64                                                                  \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22," \
  "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,"    \
  "%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QKERN_WGMMA_128                                                                  \
  QKERN_WGMMA_64                                                                         \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84" \
  ",%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,"    \
  "%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120" \
  ",%121,%122,%123,%124,%125,%126,%127"
#define QKERN_SUMS_8(d, i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define QKERN_SUMS_64(d, i)                                                                     \
  QKERN_SUMS_8(d, i), QKERN_SUMS_8(d, i + 8), QKERN_SUMS_8(d, i + 16), QKERN_SUMS_8(d, i + 24), \
      QKERN_SUMS_8(d, i + 32), QKERN_SUMS_8(d, i + 40), QKERN_SUMS_8(d, i + 48),                \
      QKERN_SUMS_8(d, i + 56)
#define QKERN_WGMMA(type)                                                                         \
  if constexpr (kValues == 64) {                                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " QKERN_WGMMA_64  \
                 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, %69;\n"                                     \
                 : QKERN_SUMS_64(d, 0)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed ? 1 : 0)); \
  } else {                                                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " QKERN_WGMMA_128 \
                 "}, {%128,%129,%130,%131}, %132, 1, 1, 1, %133;\n"                               \
                 : QKERN_SUMS_64(d, 0), QKERN_SUMS_64(d, 64)                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed ? 1 : 0)); \
  }

// Starts d += a b for a 64x16 a and a 16xN b of T (Float16 or BFloat16) and a float32 d, N = 128 or
// 256 for 64 or 128 values of a thread; the threads of a warpgroup call it. Warp w of it has rows
// 16w...16w+15 of a and d. With g = lane / 4 and t = lane % 4,
//   a[i] holds row g + 8 * (i & 1), columns 2t + 8 * (i >> 1) and the next (low half first),
//   d[i] is row g + 8 * (i >> 1 & 1), column 8 * (i >> 2) + 2t + (i & 1).
// `b` is the descriptor of b, which lies column after column or, kTransposed, row after row.
template <typename T, bool kTransposed, int kValues>
QKERN_DEVICE void wgmma_64xNx16(float (&d)[kValues], const std::uint32_t (&a)[4], std::uint64_t b) {
  static_assert(kValues == 64 || kValues == 128);
  if constexpr (std::is_same_v<T, Float16>) {
    QKERN_WGMMA("f16")
  } else {
    QKERN_WGMMA("bf16")
  }
}

#undef QKERN_WGMMA
#undef QKERN_SUMS_64
#undef QKERN_SUMS_8
#undef QKERN_WGMMA_128
#undef QKERN_WGMMA_64

}  // namespace qkern::cuda
#endif  // QKERN_CUDA_EMULATED

namespace qkern::cuda {

// A matrix in shared memory that products read as their second operand: 128 bytes to a line, chunk
// c (16 bytes) of a line at place c ^ (line % 8); eight lines are a piece of 1024 bytes, aligned to
// as many.
//   Column after column: a line is a column, 64 of its rows; the next eight are `stride` bytes on.
//   Row after row: a line is 64 columns of a row; the next eight rows are `stride` bytes on, the
//     next 64 columns `leading`.
struct SharedMatrix {
  const uint4* start;
  unsigned leading, stride;
};

constexpr int kMatrixLine = 8;               // chunks
constexpr unsigned kMatrixPiece = 8 * 128u;  // bytes of eight lines

// Where a chunk of a line lies, in chunks from the matrix's start.
QKERN_DEVICE int line_position(int line, int chunk) {
  return line * kMatrixLine + (chunk ^ (line % 8));
}

// d += a b of the matrix's rows 16 * step...16 * step + 15; see wgmma_64xNx16.
template <typename T, bool kTransposed, int kValues>
QKERN_DEVICE void start_products(float (&d)[kValues], const std::uint32_t (&a)[4],
                                 const SharedMatrix& b, int step) {
#if defined(QKERN_CODEC_SELECT) && !defined(QKERN_CUDA_EMULATED)
  // What is read, for provers of race-freedom: of lines, whose parts the steps take, all.
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  constexpr int kLines = kTransposed ? 16 * (2 * kValues / 64) : 2 * kValues;
  if (!kTransposed && step > 0) return;
#pragma unroll
  for (int chunk = lane; chunk < kLines * kMatrixLine; chunk += kWarp) {
    const int line = chunk / kMatrixLine;
    const int first = kTransposed ? line / 16 * static_cast<int>(b.leading / sizeof(uint4)) +
                                        (16 * step + line % 16) * kMatrixLine
                                  : line * kMatrixLine;
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(shared_address(b.start + first + chunk % kMatrixLine))
                 : "memory");
    d[0] += __uint_as_float(value.x ^ a[0]);
  }
#else
  // PTX ISA, "Matrix Descriptor Format"; a step moves the start.
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  const unsigned start = shared_address(b.start) + step * (kTransposed ? 2 * b.stride : 32);
  wgmma_64xNx16<T, kTransposed>(d, a,
                                (start & 0x3ffffu) >> 4 |
                                    static_cast<std::uint64_t>(b.leading >> 4) << 16 |
                                    static_cast<std::uint64_t>(b.stride >> 4) << 32 | kSwizzle128);
#endif
}

}  // namespace qkern::cuda
