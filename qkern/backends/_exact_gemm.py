"""A vendor's GEMM whose sums are in float32 and rounded once, whatever torch lets it do.

By default torch lets cuBLAS add the parts of a split contraction in bfloat16 or float16, and on
request multiply float32 in TF32 or add in float16. That is set for a process, not for a call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_EXACT: dict[str, Any] = {
    "allow_bf16_reduced_precision_reduction": False,
    "allow_fp16_reduced_precision_reduction": False,
    "allow_fp16_accumulation": False,
    "fp32_precision": "ieee",
    "allow_tf32": False,
}
"""The settings of ``torch.backends.cuda.matmul`` that change a sum, and what they must be.

The last is that of versions that lack ``fp32_precision``; others refuse a mixture of the two.
"""

_lock = threading.Lock()
_inside = 0  # how many threads have their products now
_found: dict[str, Any] = {}  # what they are to leave behind


@contextmanager
def exact_products() -> Iterator[None]:
    """Have matrix products be exact but for one rounding of float32 sums.

    Products that other threads start meanwhile are as exact. What was set before is set again when
    the last thread leaves.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _found.update(_as_set())
            _set({name: _exact(name, value) for name, value in _found.items()})
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set(_found)
                _found.clear()


def _as_set() -> dict[str, Any]:
    """What this version of torch has of the settings, as they are."""
    matmul, found = torch.backends.cuda.matmul, {}
    for name in _EXACT:
        if name == "allow_tf32" and "fp32_precision" in found:
            continue
        try:
            found[name] = getattr(matmul, name)
        except AttributeError:  # of a version that lacks it
            continue
        if hasattr(matmul, f"{name}_split_k"):  # set together with it
            found[name] = found[name], getattr(matmul, f"{name}_split_k")
    return found


def _exact(name: str, found: Any) -> Any:
    return (_EXACT[name], found[1]) if isinstance(found, tuple) else _EXACT[name]


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(torch.backends.cuda.matmul, name, value)
