// The kernels' one body, compiled for one instruction set. All of it has internal linkage, and no
// standard template is instantiated here: a copy that the linker shared with other files might use
// instructions that the processor lacks.
#include "simd_avx512.h"

#include "kernels.h"

#include "all_kernels.h"
#include "dot_avx512.h"
#include "kernels_dot.h"

namespace qkern::cpu {

const KernelTable& kernels_avx512() {
  static const KernelTable table = with_dots(kKernels);
  return table;
}

}  // namespace qkern::cpu
