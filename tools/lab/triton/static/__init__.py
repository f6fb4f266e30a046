"""Triton's kernels compiled for devices that are not here, and their machine code's figures."""
