"""Optimizers of each pager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qkern.optim import PagedAdamW

LEAST_BUDGET = 64 << 10


class Made:
    """Optimizers of one pager; those with files each have one of their own."""

    def __init__(self, pager: str, folder: Path) -> None:
        self.pager = pager
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._count = 0

    def __call__(self, params: Any, **options: Any) -> PagedAdamW:
        if self.pager == "mmap":
            self._count += 1
            options = {"budget_bytes": LEAST_BUDGET} | options
            options |= {"path": self.folder / f"state{self._count}"}
        if self.pager == "unified":
            options = {"budget_bytes": LEAST_BUDGET} | options
        return PagedAdamW(params, pager=self.pager, **options)
