"""Optimizers whose state may live outside fast memory."""

from qkern.optim._chunkfile import ChunkFileError, DamagedChunksError
from qkern.optim.adamw import PagedAdamW, PagedAdamW8bit

__all__ = ["ChunkFileError", "DamagedChunksError", "PagedAdamW", "PagedAdamW8bit"]
