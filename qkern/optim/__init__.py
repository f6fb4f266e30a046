"""Optimizers whose state may live outside fast memory."""

from qkern.optim._file_layout import ChunkFileError, DamagedChunksError
from qkern.optim._groups import parameter_groups
from qkern.optim.optimizer import PagedAdamW, PagedAdamW8bit

__all__ = [
    "ChunkFileError",
    "DamagedChunksError",
    "PagedAdamW",
    "PagedAdamW8bit",
    "parameter_groups",
]
