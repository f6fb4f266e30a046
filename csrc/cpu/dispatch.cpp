#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace qkern::cpu {
namespace {

int available_tables(const KernelTable** tables) {
  int count = 0;
  tables[count++] = &kernels_scalar();
#if defined(QKERN_HAVE_AVX2)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    tables[count++] = &kernels_avx2();
  }
#endif
#if defined(QKERN_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables[count++] = &kernels_avx512();
  }
#endif
  return count;
}

const KernelTable* find(const char* name) {
  const KernelTable* tables[kMaxIsas];
  const int count = available_tables(tables);
  if (name == nullptr || *name == '\0') return tables[count - 1];
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(tables[i]->name, name) == 0) return tables[i];
  }
  return nullptr;
}

const KernelTable* default_table() {
  static const KernelTable* const table = find(std::getenv("QKERN_CPU_ISA"));
  return table;
}

std::atomic<const KernelTable*> forced{nullptr};

}  // namespace

const KernelTable* active_kernels() {
  const KernelTable* table = forced.load(std::memory_order_relaxed);
  return table != nullptr ? table : default_table();
}

int available_isas(const char** names) {
  const KernelTable* tables[kMaxIsas];
  const int count = available_tables(tables);
  for (int i = 0; i < count; ++i) names[i] = tables[i]->name;
  return count;
}

Status set_isa(const char* name) {
  if (*name == '\0') {
    forced.store(nullptr);
    return Status::success();
  }
  const KernelTable* table = find(name);
  if (table == nullptr) return Status::error("not an instruction set that this processor runs");
  forced.store(table);
  return Status::success();
}

}  // namespace qkern::cpu
