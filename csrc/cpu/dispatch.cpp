#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "probe.h"
#include "thread_isa.h"

#if defined(QKERN_HAVE_AVX2)
#include <cpuid.h>
#endif
#if defined(QKERN_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qkern::cpu {
namespace {

#if defined(QKERN_HAVE_AVX2)
// Half-precision conversions, by number: not all compilers know the name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & 1u << 29) != 0;
}

bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx512f") &&
         __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & 1u << 5) != 0;
}
#endif

#if defined(QKERN_HAVE_AVX512BF16) || defined(QKERN_HAVE_AMX)
// AVX512-BF16, VBMI and VNNI: what the kernels on pairs of bfloat16 use.
bool has_bfloat16_pairs() {
  return has_avx512_bf16() && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(QKERN_HAVE_AMX)
// Tiles, their bfloat16 product, those same instructions, and the kernel's leave to use the tiles,
// which Linux gives a process on request.
bool amx_usable() {
#if defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kTileAndBf16 = 1u << 24 | 1u << 22;
  if ((edx & kTileAndBf16) != kTileAndBf16 || !has_bfloat16_pairs()) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::atomic<double> probed_rate{0.0};

int available_tables(const KernelTable** tables) {
  int count = 0;
  tables[count++] = &kernels_scalar();
#if defined(QKERN_HAVE_AVX2)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    tables[count++] = &kernels_avx2();
  }
#endif
#if defined(QKERN_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables[count++] = &kernels_avx512();
#if defined(QKERN_HAVE_AVX512VNNI)
    if (__builtin_cpu_supports("avx512vnni")) tables[count++] = &kernels_avx512vnni();
#endif
#if defined(QKERN_HAVE_AVX512BF16)
    // Asked once; see multiplies_bfloat16.
    static const bool has_pairs = has_bfloat16_pairs();
    if (has_pairs) tables[count++] = &kernels_avx512bf16();
#endif
#if defined(QKERN_HAVE_AMX)
    static const bool has_amx = amx_usable();
    if (has_amx) tables[count++] = &kernels_amx();
#endif
  }
#endif
#if defined(QKERN_HAVE_NEON)
  tables[count++] = &kernels_neon();  // part of every AArch64 processor that runs this build
#endif
  return count;
}

const KernelTable* find(const char* name) {
  const KernelTable* tables[kMaxIsas];
  const int count = available_tables(tables);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(tables[i]->name, name) == 0) return tables[i];
  }
  return nullptr;
}

const char* isa_from_environment() {
  static const char* const name = std::getenv("QKERN_CPU_ISA");
  return name;
}

// The widest instruction set, but for bfloat16 products that are slower than float32's.
const KernelTable* best_table() {
  const KernelTable* tables[kMaxIsas];
  const int count = available_tables(tables);
#if defined(QKERN_HAVE_AVX512BF16)
  // By its name: where the processor lacks them, none of that file's functions may run.
  if (std::strcmp(tables[count - 1]->name, "avx512bf16") == 0) {
    const double rate = measure_bfloat16_rate(probe_strips());
    probed_rate.store(rate, std::memory_order_relaxed);
    return tables[bfloat16_pays(rate) ? count - 1 : count - 2];
  }
#endif
  return tables[count - 1];
}

// Chosen once in a process, so that equal calls have equal bits.
const KernelTable* default_table() {
  static const KernelTable* const table = [] {
    const char* name = isa_from_environment();
    return name == nullptr || *name == '\0' ? best_table() : find(name);
  }();
  return table;
}

std::atomic<const KernelTable*> forced{nullptr};

#if defined(QKERN_HAVE_AVX2)
bool isa_is_chosen() {
  const char* name = isa_from_environment();
  return isa_of_thread != nullptr || forced.load(std::memory_order_relaxed) != nullptr ||
         (name != nullptr && *name != '\0');
}
#endif

}  // namespace

const KernelTable* active_kernels() {
  if (isa_of_thread != nullptr) return find(isa_of_thread);
  const KernelTable* table = forced.load(std::memory_order_relaxed);
  return table != nullptr ? table : default_table();
}

int available_isas(const char** names) {
  const KernelTable* tables[kMaxIsas];
  const int count = available_tables(tables);
  for (int i = 0; i < count; ++i) names[i] = tables[i]->name;
  return count;
}

const char* unknown_isa() {
  static const std::string message = [] {
    const char* given = isa_from_environment();
    std::string text = "QKERN_CPU_ISA: got '" + std::string(given == nullptr ? "" : given) + "'";
    const char* names[kMaxIsas];
    const int count = available_isas(names);
    for (int i = 0; i < count; ++i)
      text += (i == 0 ? "; takes one of " : ", ") + std::string(names[i]);
    return text;
  }();
  return message.c_str();
}

bool multiplies_bfloat16() {
#if defined(QKERN_HAVE_AVX2)
  // Asked once: a virtual machine takes microseconds to answer, and every layer asks.
  static const bool has_bf16 = has_avx512_bf16();
  if (!isa_is_chosen()) return has_bf16;
  // By its name: the tables of wider instruction sets are built with those instructions.
  const KernelTable* const active = active_kernels();
  return active != nullptr &&
         (std::strcmp(active->name, "avx512bf16") == 0 || std::strcmp(active->name, "amx") == 0);
#else
  return true;
#endif
}

double bfloat16_rate() { return probed_rate.load(std::memory_order_relaxed); }

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
