// Every instruction that CUDA C++ has no name for, each behind one small function. The emulator
// brings its own bodies; the comments here are what they must do.
#pragma once

#include "platform.h"
#include "qkern/dtype.h"

#ifdef QKERN_CUDA_EMULATED
#include "cuda_emulator_ptx.h"
#else
namespace qkern::cuda {

// 16 bytes from global memory that no kernel writes; `p` is 16-aligned.
QKERN_DEVICE uint4 load_global16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// 16 bytes to global memory; `p` is 16-aligned. An assignment may become four stores.
QKERN_DEVICE void store_global16(void* p, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"l"(__cvta_generic_to_global(p)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// kWords neighbouring words (1, 2 or 4) of global memory that the kernel may write as well, in one
// access; `p` is aligned to them.
template <int kWords>
QKERN_DEVICE void load_words(const void* p, std::uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  const auto from = __cvta_generic_to_global(p);
  if constexpr (kWords == 4) {
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
  } else if constexpr (kWords == 2) {
    asm volatile("ld.global.v2.u32 {%0,%1}, [%2];\n" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
  } else {
    asm volatile("ld.global.u32 %0, [%1];\n" : "=r"(words[0]) : "l"(from));
  }
}

// The same of a store.
template <int kWords>
QKERN_DEVICE void store_words(void* p, const std::uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  const auto to = __cvta_generic_to_global(p);
  if constexpr (kWords == 4) {
    store_global16(p, uint4{words[0], words[1], words[2], words[3]});
  } else if constexpr (kWords == 2) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};\n" ::"l"(to), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
    asm volatile("st.global.u32 [%0], %1;\n" ::"l"(to), "r"(words[0]) : "memory");
  }
}

// The largest of a warp's values, in all of its lanes, which all call it.
QKERN_DEVICE unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, value);
#else
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
#endif
}

// The sum of a warp's values, in all of its lanes, which all call it.
QKERN_DEVICE unsigned warp_sum(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, value);
#else
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
#endif
}

// base + index, in the one instruction that this is; the compiler takes four where it knows that
// the index is a byte.
QKERN_DEVICE const float* address_of(const float* base, unsigned index) {
  const float* address;
  asm("mad.wide.u32 %0, %1, 4, %2;" : "=l"(address) : "r"(index), "l"(base));
  return address;
}

// Byte i of the result is the byte, of the eight in `low` and `high`, that nibble i of `selector`
// names; a nibble above 7 is taken for a sign to copy. The selector's upper half is not read.
// __byte_perm masks nibbles, which takes an instruction.
QKERN_DEVICE std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high,
                                         std::uint32_t selector) {
  std::uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// Copies 16 bytes from global to shared memory, both 16-aligned, without a register in between;
// zeros where not `valid`, and then `source` is not read. Done after cp_async_wait. Before sm_80
// the copy is done at once, and the warp waits for it: other blocks must have work meanwhile.
QKERN_DEVICE void cp_async16(void* shared, const void* source, bool valid) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? load_global16(source) : uint4{0, 0, 0, 0};
#endif
}

// Closes the group of this thread's copies since the last commit.
QKERN_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's youngest groups are unfinished.
template <int kPending>
QKERN_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit values from shared memory; all lanes of the warp call it. Lane 8i + r
// gives the address, 16-aligned, of row r of matrix i. out[i] of lane (g, t), g = lane / 4 and
// t = lane % 4, holds row g, columns 2t (low half) and 2t + 1 of matrix i.
QKERN_DEVICE void load_matrices(const void* row, std::uint32_t (&out)[4]) {
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

// The same of their transposes: column g, rows 2t and 2t + 1.
QKERN_DEVICE void load_matrices_transposed(const void* row, std::uint32_t (&out)[4]) {
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

// d += a b for a 16x16 a and a 16x8 b of T (Float16 or BFloat16) and a float32 d, as fragments of
// mma.m16n8k16 (PTX ISA): with g = lane / 4 and t = lane % 4,
//   a[i] holds row g + 8 * (i & 1), columns 2t + 8 * (i >> 1) and the next (low half first),
//   b[i] holds column g, rows 2t + 8 * i and the next,
//   d[i] is row g + 8 * (i >> 1), column 2t + (i & 1).
template <typename T>
QKERN_DEVICE void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2]);

template <>
QKERN_DEVICE void mma_16x8x16<Float16>(float (&d)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // sm_75 has the half of it: columns 0-7 of a, then 8-15.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

// sm_75 has no bf16 tensor cores: launchers take another kernel there.
template <>
QKERN_DEVICE void mma_16x8x16<BFloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace qkern::cuda
#endif  // QKERN_CUDA_EMULATED
