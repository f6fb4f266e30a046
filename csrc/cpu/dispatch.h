#pragma once

#include "kernel_table.h"
#include "subnormals.h"

namespace qkern::cpu {

// Names of the instruction sets that were built and that this processor runs, worst first.
// Returns their number; `names` takes up to kMaxIsas.
inline constexpr int kMaxIsas = 8;
int available_isas(const char** names);

// The error where QKERN_CPU_ISA names none of them. It lives as long as the program.
const char* unknown_isa();

// fn(the table in force), or that error.
template <typename Fn>
Status with_kernels(const Fn& fn) {
  [[maybe_unused]] const KeepSubnormals keep;
  const KernelTable* table = active_kernels();
  return table == nullptr ? Status::error(unknown_isa()) : fn(*table);
}

// Makes `name` the one in force; "" goes back to QKERN_CPU_ISA, or the best where that is not set.
Status set_isa(const char* name);

// Whether the processor has instructions that multiply bfloat16. A chosen instruction set hides
// wider ones. Without x86's cpuid there is no answer, and it is taken to have them.
bool multiplies_bfloat16();

// What the probe measured (see probe.h), or 0 before it was asked or where nothing asks it: where
// an instruction set is chosen, and where avx512bf16 is not the widest.
double bfloat16_rate();

}  // namespace qkern::cpu
