"""The CUDA kernels without a GPU: emulated, with planted bugs, proved, and read as machine code."""
