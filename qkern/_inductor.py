"""Calls of the matmuls from the code that torch's compiler writes, without the dispatcher.

A compiled graph calls an op of another library by ``torch.ops``: for a layer of a small model the
dispatcher then takes as long as the kernel. Newer versions of torch let a library say how its op is
called instead; with older ones, and from code that is written in C++, the op is called as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkern._settings import batch_invariance, int8_activations, none_set
from qkern.backends import num_threads
from qkern.ops import undispatched

_REGISTRY = "torch._inductor.codegen.custom_extern_kernel_codegen"


def _kernel(x: Tensor, op: str, invariant: bool | None) -> tuple[Callable[..., Any] | None, bool]:
    """The kernel of an op on ``x``, and whether it is batch-invariant, in the blocks around it.

    None where somebody would miss the op. The input gradient has no form in 8 bits, which the op
    says.
    """
    backend = undispatched(x)
    if backend is None:
        return None, False
    if invariant is None and not none_set():
        invariant = batch_invariance.get()
        if int8_activations.get():
            op += "_int8"
    return backend.fast.get(op), bool(invariant)


def linear_4bit(x: Tensor, *args: Any) -> Tensor:
    """The op ``linear_4bit``; its kernel alone where nobody would miss the op."""
    if len(args) == 10:
        features, bias, invariant = args[7:]
        kernel, invariant = _kernel(x, "linear_4bit", invariant)
        if kernel is not None:
            y: Tensor | None = kernel(x, args[:7], features, bias, invariant, num_threads())
            if y is not None:
                return y
    return torch.ops.qkern.linear_4bit.default(x, *args)


def linear_4bit_dx(dy: Tensor, *args: Any) -> Tensor:
    """The op ``linear_4bit_dx`` likewise."""
    if len(args) == 9:
        features, invariant = args[7:]
        kernel, invariant = _kernel(dy, "linear_4bit_dx", invariant)
        if kernel is not None:
            dx: Tensor | None = kernel(dy, args[:7], features, invariant, num_threads())
            if dx is not None:
                return dx
    return torch.ops.qkern.linear_4bit_dx.default(dy, *args)


DIRECT = (linear_4bit, linear_4bit_dx)


def tell_compiler() -> None:
    """Have graphs that are compiled from now on call the functions above.

    Asked whenever an op is traced, because qkern does not import the compiler, which takes longer
    than all else that it imports.
    """
    registry = sys.modules.get(_REGISTRY)
    table = getattr(registry, "CUSTOM_EXTERN_KERNEL_CODEGEN", None)
    made = getattr(registry, "CustomCodegen", None)
    if not isinstance(table, dict) or made is None:
        return
    for function in DIRECT:
        op = f"torch.ops.qkern.{function.__name__}.default"
        if op not in table:
            table[op] = made(python=_writer(function.__name__))


def _writer(name: str) -> Callable[[Any, Callable[[str], None]], None]:
    """What writes a call of the function ``name``, as torch asks for it."""

    def write(node: Any, writeline: Callable[[str], None]) -> None:
        from torch._inductor.virtualized import V

        V.graph.wrapper_code.add_import_once("from qkern import _inductor as _qkern")
        arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
        writeline(f"{node.get_name()} = _qkern.{name}({arguments})")

    return write
