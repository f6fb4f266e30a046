"""Triton's kernels compiled for devices that are not here, and the figures of their machine code."""
