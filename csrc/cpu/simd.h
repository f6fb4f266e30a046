// Simd, the registers of the instruction set that kernels are compiled for: that of the simd_*.h
// which an isa_*.cpp includes first, else plain C++. A kernel's header is compiled once for each.
#pragma once

#ifndef QKERN_HAS_SIMD
#include "simd_scalar.h"
#endif
