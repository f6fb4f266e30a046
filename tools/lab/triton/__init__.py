"""The Triton kernels without a GPU: see README.md."""
