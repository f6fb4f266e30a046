"""Runs the op table on Triton's interpreter: a process of its own, with ``TRITON_INTERPRET=1``.

``python -m lab.triton.interpreter STRIDE LARGEST [FIRST]``: every STRIDE-th case, from the FIRST
on, of at most LARGEST multiply-adds or elements. Prints each case before it runs, and their number
at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from lab.triton import semantics
from qkern import backends, testing

Handle = interpreter.TensorHandle


def to_bfloat16(values: Any) -> Any:
    """The bits, uint16, of float32 values rounded to nearest, ties to even."""
    floats = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return floats.to(torch.bfloat16).view(torch.uint16).numpy()


def to_float32(bits: Any) -> Any:
    """The float32 values of bfloat16 bits."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def widened(handle: Any) -> Any:
    """The same values in float32, where they are bfloat16."""
    return Handle(to_float32(handle.data), tl.float32) if is_bfloat16(handle) else handle


def correct_bfloat16() -> None:
    """Make the interpreter convert, add and multiply bfloat16 by value, not by its bits."""
    builder = interpreter.InterpreterBuilder
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if is_bfloat16(source):
            source = widened(source)
            return source if to.scalar == tl.float32 else cast_impl(self, source, to)
        if to.scalar == tl.bfloat16:
            return Handle(to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, to)

    def binary_op(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        result = binary(self, widened(left), widened(right), op)
        if is_bfloat16(left) and result.data.dtype == np.float32:
            return Handle(to_bfloat16(result.data), tl.bfloat16)
        return result

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    builder.cast_impl, builder.binary_op, builder.create_dot = cast_impl, binary_op, create_dot
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(builder, f"create_{name}", lambda self, source, to: cast_impl(self, source, to))


class Interpreted(testing.Target):
    """A target of the op table: the kernels in the interpreter, launched by `module`."""

    __slots__ = ("module",)

    def __init__(self, module: Any) -> None:
        super().__init__(module.name, "interpreter")
        object.__setattr__(self, "module", module)

    def activate(self) -> Any:
        return backends.use(self.module)


def main(stride: str, largest: str, first: str = "0") -> None:
    """Command line."""
    correct_bfloat16()
    modules = [semantics.backend(device) for device in semantics.DEVICES]
    specs = [s for s in testing.OPS.values() if backends.has_kernel("triton", s.name)]
    table = [(spec, case) for spec in specs for case in spec.cases]
    chosen = [(s, c) for s, c in table if c.numel <= int(largest)][int(first) :: int(stride)]
    for i, (spec, case) in enumerate(chosen):
        target = Interpreted(modules[i % len(modules)])
        print(spec.id(case, target), flush=True)
        testing.check(spec, case, target)
    print(f"{len(chosen)} cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
