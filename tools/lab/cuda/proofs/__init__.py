"""Proofs, by sentryward, that no CUDA kernel races in one small launch."""
