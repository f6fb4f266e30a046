"""Modes of torch that note what runs under them."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Noting:
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Ops(_Noting, TorchDispatchMode):
    """The ops of torch, qkern's among them, by name, say ``qkern.adamw_step.default``."""

    def __torch_dispatch__(self, *call: Any) -> Any:
        return self.note(*call)


class Functions(_Noting, TorchFunctionMode):
    """The functions of torch that are called."""

    def __torch_function__(self, *call: Any) -> Any:
        return self.note(*call)
