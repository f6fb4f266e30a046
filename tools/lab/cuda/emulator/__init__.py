"""CUDA's threads on a CPU: see README.md."""
