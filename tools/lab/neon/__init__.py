"""The AArch64 kernels on another CPU: a server that QEMU runs, and the backend that asks it."""
