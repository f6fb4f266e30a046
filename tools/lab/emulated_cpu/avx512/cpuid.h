// A processor that has everything: what csrc/cpu/dispatch.cpp asks is answered with yes.
// __builtin_cpu_supports, which no header can replace, is a macro of the build.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

inline int __get_cpuid(unsigned, unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx) {
  *eax = *ebx = *ecx = *edx = ~0u;
  return 1;
}
inline int __get_cpuid_count(unsigned, unsigned, unsigned* eax, unsigned* ebx, unsigned* ecx,
                             unsigned* edx) {
  return __get_cpuid(0, eax, ebx, ecx, edx);
}

// Linux's leave to use AMX's tiles, which dispatch.cpp asks for.
inline long emulated_syscall(long number, long request, long) {
  return number == SYS_arch_prctl && request == 0x1023 ? 0 : -1;
}
#define syscall emulated_syscall
