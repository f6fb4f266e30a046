// AVX-512 with VNNI: a few rows of 16-bit x go by its dot products of integers, all else as in
// isa_avx512.cpp, and for the same reasons all here has internal linkage.
#include "simd_avx512.h"

#include "kernels.h"

#include "dot_avx512.h"
#include "kernels_dot.h"

namespace qkern::cpu {

const KernelTable& kernels_avx512vnni() {
  static const KernelTable table = [] {
    KernelTable found = with_dots(kernels_avx512());
    found.name = "avx512vnni";
    return found;
  }();
  return table;
}

}  // namespace qkern::cpu
