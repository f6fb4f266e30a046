// Tables for the instruction sets that a build leaves out: those of plain C++.
#include "kernel_table.h"

namespace qkern::cpu {

#if defined(QKERN_STAND_IN_AVX2)
const KernelTable& kernels_avx2() { return kernels_scalar(); }
#endif
#if defined(QKERN_STAND_IN_AVX512)
const KernelTable& kernels_avx512() { return kernels_scalar(); }
#endif
#if defined(QKERN_STAND_IN_AVX512VNNI)
const KernelTable& kernels_avx512vnni() { return kernels_scalar(); }
#endif

}  // namespace qkern::cpu
