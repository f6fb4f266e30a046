"""Planted bugs in the CUDA kernels, and what must notice each: see ../test_cuda_mutants.py."""
