"""qkern's ops as Triton kernels, one file an op.

``codec`` holds what they share, ``launch`` how each is launched on which device. A kernel sees
pointers, sizes and strides; the backend ``triton`` checks tensors and calls the functions here.
Importing this package imports Triton.
"""
