"""Reads what nvcc made of the CUDA kernels; the figures come from machine code, without a GPU."""
