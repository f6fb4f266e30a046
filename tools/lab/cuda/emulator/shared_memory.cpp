#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda_emulator/sanitizers.h"
#include "cuda_emulator/scheduler.h"

namespace qkern::cuda::emulator {
namespace {

constexpr std::size_t kSharedAlignment = 16;

}  // namespace

SharedVariable::SharedVariable(const void* key_, std::size_t size_) : key(key_), size(size_) {
  const TsanIgnores ignores;
  const std::size_t padded = (size + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  data = static_cast<unsigned char*>(
      std::aligned_alloc(kSharedAlignment, std::max<std::size_t>(padded, 16)));
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, kPoisonByte, size);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(data + size, padded - size);
#endif
}

SharedVariable::~SharedVariable() {
  const TsanIgnores ignores;
  std::free(data);
}

}  // namespace qkern::cuda::emulator
