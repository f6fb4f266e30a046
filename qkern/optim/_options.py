"""Checks of the optimizer's arguments and of its groups' options."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qkern import _errors

PAGERS = ("auto", "none", "unified", "mmap")
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def check_arguments(amsgrad: object, pager: str, max_grad_norm: float | None, seed: object) -> None:
    """Raises ``ValueError`` for what is wrong whatever the parameters are."""
    check_amsgrad(amsgrad)
    if pager not in PAGERS:
        raise ValueError(f"pager: got {pager!r}; takes one of {', '.join(PAGERS)}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm: got {max_grad_norm}; takes a norm above 0, or None")
    if not (isinstance(seed, int) and 0 <= seed < 1 << 32):
        raise ValueError(f"seed: got {seed}; takes 0 to 2^32 - 1")


def check_paging(
    pager: str, path: object, resume: bool, durable: bool, budget_bytes: int | None
) -> None:
    """Raises ``ValueError`` for options of another pager."""
    given = {"path": path, "resume": resume or None, "durable": durable or None}
    for name, value in given.items():
        if pager != "mmap" and value is not None:
            raise ValueError(f'{name}: got {value!r} with pager "{pager}"; goes with "mmap"')
    if pager == "none" and budget_bytes is not None:
        raise ValueError(
            f'budget_bytes: got {budget_bytes} with pager "none"; goes with "unified" and "mmap"'
        )


def check_group(group: dict[str, Any]) -> None:
    """Raises ``ValueError`` for an option, ``TypeError`` for a parameter's dtype."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr: got shape {list(group['lr'].shape)}; takes one number")
    for name in ("lr", "eps", "weight_decay"):
        value = float(group[name])
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value}; takes a number of 0 and above")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas: got {group['betas']}; takes two numbers from 0 to below 1")
    if group["bits"] not in (32, 8):
        raise ValueError(f"bits: got {group['bits']!r}; takes 32 or 8")
    check_amsgrad(group.get("amsgrad"))
    for param in group["params"]:
        if not is_integer(param):
            _errors.check_float_tensor("params", param)


def is_integer(param: Tensor) -> bool:
    """Whether a parameter holds integers, as of a 4-bit weight: never updated, without moments."""
    return param.dtype in _INTEGERS


def check_amsgrad(amsgrad: object) -> None:
    """Raises ``ValueError`` where AMSGrad is asked for."""
    if amsgrad:
        raise ValueError("amsgrad: got True; takes False: use torch.optim.AdamW for AMSGrad")
