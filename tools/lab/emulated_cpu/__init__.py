"""The CPU kernels of other processors: a server that runs them, and the backend that asks it.

AArch64 runs under QEMU. AVX-512 and AMX run here, their intrinsics being plain C++ (`avx512`).
"""
