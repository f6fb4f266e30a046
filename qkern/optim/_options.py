"""Checks of the optimizer's arguments and of its groups' options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkern import _errors
from qkern._errors import type_name

PAGERS = ("auto", "none", "unified", "mmap")
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def check_arguments(
    amsgrad: object,
    pager: object,
    max_grad_norm: Any,
    seed: Any,
    min_8bit_size: Any,
    budget_bytes: Any,
    flags: Mapping[str, object],
) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what is wrong whatever the parameters are."""
    check_amsgrad(amsgrad)
    if pager not in PAGERS:
        raise ValueError(f"pager: got {pager!r}; takes one of {', '.join(PAGERS)}")
    if max_grad_norm is not None:
        _check_number("max_grad_norm", max_grad_norm)
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: got {max_grad_norm}; takes a norm above 0, or None")
    if not (_is_whole(seed) and 0 <= seed < 1 << 32):
        raise ValueError(f"seed: got {seed}; takes 0 to 2^32 - 1")
    if not _is_whole(min_8bit_size) or min_8bit_size < 0:
        raise ValueError(f"min_8bit_size: got {min_8bit_size!r}; takes a whole number from 0")
    if budget_bytes is not None and not _is_whole(budget_bytes):
        raise TypeError(f"budget_bytes: got {type_name(budget_bytes)}; takes a whole number")
    for name, flag in flags.items():
        _check_flag(name, flag)


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
    """Raises ``ValueError`` or ``TypeError`` for an option, ``TypeError`` for a parameter."""
    check_options(group)
    for param in group["params"]:
        if not is_integer(param):
            _errors.check_float_tensor("params", param)


def check_options(group: Mapping[str, Any], name: str = "") -> None:
    """The same without the parameters; errors begin with ``name``."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{name}lr: got shape {list(lr.shape)}; takes one number")
        if lr.dtype.is_complex or lr.dtype is torch.bool or lr.device.type == "meta":
            raise TypeError(f"{name}lr: got a {type_name(lr)} on {lr.device}; takes a real number")
    else:
        _check_number(f"{name}lr", lr)
    for option in ("eps", "weight_decay"):
        _check_number(f"{name}{option}", group[option])
    for option in ("lr", "eps", "weight_decay"):
        value = float(group[option])
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}{option}: got {value}; takes a number of 0 and above")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"{name}betas: got {type_name(betas)}; takes two numbers")
    for beta in betas:
        _check_number(f"{name}betas", beta)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{name}betas: got {betas}; takes two numbers from 0 to below 1")
    if not _is_whole(group["bits"]) or group["bits"] not in (32, 8):
        raise ValueError(f"{name}bits: got {group['bits']!r}; takes 32 or 8")
    _check_flag(f"{name}maximize", group["maximize"])
    check_amsgrad(group.get("amsgrad"), name)


def _check_number(name: str, value: object) -> None:
    # True is a number to Python, and NumPy's is none.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type_name(value)}; takes a real number")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; takes True or False")


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_integer(param: Tensor) -> bool:
    """Whether a parameter holds integers, as of a 4-bit weight: never updated, without moments."""
    return param.dtype in _INTEGERS


def check_amsgrad(amsgrad: object, name: str = "") -> None:
    """Raises ``ValueError`` where AMSGrad is asked for."""
    if amsgrad is not None and amsgrad is not False:
        raise ValueError(
            f"{name}amsgrad: got {amsgrad!r}; takes False: use torch.optim.AdamW for AMSGrad"
        )
