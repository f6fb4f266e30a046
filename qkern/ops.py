"""The ops ``torch.ops.qkern.*``: schemas, shapes for tracing, and dispatch to a backend.

``qkern.reference`` documents each op. The ops have no autograd formula of their own; that is
``qkern.autograd``, which costs less per call. They are registered once for all devices:
``backends.select`` looks at the tensor's device at each call, so that a backend can be forced after
tracing too. A user calls ``qkern.functional``, which checks arguments and explains errors; the ops
themselves reject what would be unsafe.

Where ``unobserved``, the matmuls' callers call the kernel alone: on a small layer an op costs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkern import backends, formats
from qkern.backends import native, select
from qkern.backends._args import num_threads

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
_LAYOUT = "str format, int block_size"

SCHEMAS = (
    f"quantize_4bit(Tensor x, {_LAYOUT}, Tensor? codebook) -> (Tensor, Tensor)",
    f"dequantize_4bit({_WEIGHT}Tensor? codebook, {_LAYOUT}, SymInt[] shape, ScalarType dtype)"
    " -> Tensor",
    f"dequantize_4bit_out({_WEIGHT}Tensor? codebook, {_LAYOUT}, *, Tensor(a!) out) -> ()",
    "quantize_8bit(Tensor x, Tensor code, int block_size) -> (Tensor, Tensor)",
    "dequantize_8bit(Tensor codes, Tensor absmax, Tensor code, int block_size, ScalarType dtype)"
    " -> Tensor",
    "quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)",
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_absmaxes, Tensor(e!)[] exp_avg_sq_absmaxes,"
    " Tensor factors, int? seed=None, int[] indices=[], int[] offsets=[]) -> ()",
    f"linear_4bit(Tensor x, {_WEIGHT}Tensor? codebook, Tensor? bias, {_LAYOUT},"
    " SymInt out_features, bool batch_invariant=False) -> Tensor",
    f"linear_4bit_dx(Tensor dy, {_WEIGHT}Tensor? codebook, {_LAYOUT},"
    " SymInt in_features, bool batch_invariant=False) -> Tensor",
)

_library = torch.library.Library("qkern", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)


def _quantize_4bit(
    x: Tensor, format: str, block_size: int, codebook: Tensor | None
) -> tuple[Tensor, Tensor]:
    return select(x.device).quantize_4bit(x, format, block_size, codebook)


def _quantize_4bit_fake(
    x: Tensor, format: str, block_size: int, codebook: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = x.numel()
    return (
        x.new_empty((formats.packed_size(n),), dtype=torch.uint8),
        x.new_empty((formats.num_blocks(n, block_size),), dtype=torch.float32),
    )


def _dequantize_4bit(packed: Tensor, *args: object) -> Tensor:
    return select(packed.device).dequantize_4bit(packed, *args)


def _dequantize_4bit_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


def _dequantize_4bit_out(packed: Tensor, *args: object, out: Tensor) -> None:
    select(packed.device).dequantize_4bit_out(packed, *args, out=out)
    # A kernel writes through a pointer, which autograd's check for modified tensors cannot see.
    torch.autograd.graph.increment_version(out)


def _dequantize_4bit_out_fake(packed: Tensor, *args: object, out: Tensor) -> None:
    return None


def _quantize_8bit(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return select(x.device).quantize_8bit(x, code, block_size)


def _quantize_8bit_fake(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty((formats.num_blocks(x.numel(), block_size),), dtype=torch.float32),
    )


def _dequantize_8bit(codes: Tensor, *args: object) -> Tensor:
    return select(codes.device).dequantize_8bit(codes, *args)


def _dequantize_8bit_fake(
    codes: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return select(absmax.device).quantize_absmax(absmax)


def _quantize_absmax_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = formats.num_blocks(absmax.numel(), formats.NESTED_BLOCK_SIZE)
    return (
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty((groups,)),
        absmax.new_empty(()),
    )


def _adamw_step(params: Sequence[Tensor], *args: Any) -> None:
    if not params:
        return
    select(params[0].device).adamw_step(params, *args)
    _count_as_changed(params, *args[1:5])


def _count_as_changed(*lists: Sequence[Tensor]) -> None:
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


def _adamw_step_fake(params: Sequence[Tensor], *args: object) -> None:
    return None


def _linear_4bit(x: Tensor, *args: object) -> Tensor:
    return select(x.device).linear_4bit(x, *args)


def _linear_4bit_fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    format: str,
    block_size: int,
    out_features: int,
    batch_invariant: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_4bit_dx(dy: Tensor, *args: object) -> Tensor:
    return select(dy.device).linear_4bit_dx(dy, *args)


def _linear_4bit_dx_fake(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    block_size: int,
    in_features: int,
    batch_invariant: bool = False,
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], in_features))


for _name, _implementation, _fake in (
    ("quantize_4bit", _quantize_4bit, _quantize_4bit_fake),
    ("dequantize_4bit", _dequantize_4bit, _dequantize_4bit_fake),
    ("dequantize_4bit_out", _dequantize_4bit_out, _dequantize_4bit_out_fake),
    ("quantize_8bit", _quantize_8bit, _quantize_8bit_fake),
    ("dequantize_8bit", _dequantize_8bit, _dequantize_8bit_fake),
    ("quantize_absmax", _quantize_absmax, _quantize_absmax_fake),
    ("adamw_step", _adamw_step, _adamw_step_fake),
    ("linear_4bit", _linear_4bit, _linear_4bit_fake),
    ("linear_4bit_dx", _linear_4bit_dx, _linear_4bit_dx_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkern::{_name}", _fake, lib=_library)

linear_4bit = torch.ops.qkern.linear_4bit.default
_linear_4bit_dx_op = torch.ops.qkern.linear_4bit_dx.default
_adamw_step_op = torch.ops.qkern.adamw_step.default

_CPU = torch.device("cpu")


def assume() -> bool:
    """Stands for one of torch's private questions below in a version that does not answer it."""
    return True


_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", assume)
_function_modes = getattr(torch._C, "_len_torch_function_stack", assume)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", assume)
_is_tracing = getattr(torch._C, "_is_tracing", assume)
_is_profiled = getattr(torch._C._autograd, "_profiler_enabled", assume)


def forward_derivatives() -> bool:
    """Whether tensors may carry tangents, of forward-mode automatic differentiation."""
    return forward_ad._current_level >= 0


def unobserved() -> bool:
    """Whether a CPU kernel may be called without its op, because nothing would see the op.

    Tracers, modes, functorch's transforms, profilers and forward-mode derivatives would; and the
    backend chosen must be ``cpu``. What depends on the tensors, the kernel's binding and the caller
    look after: subclasses and other tensors that are not plain, gradients, autocast.
    """
    return (
        not (
            _is_dynamo_compiling()
            or _dispatch_modes()
            or _function_modes()
            or _transforms()
            or _is_tracing()
            or _is_profiled()
            or forward_derivatives()
        )
        # No entry before the first op has run, whose errors for a wrong choice are the right ones.
        and backends._selected.get(_CPU) is native
    )


def linear_4bit_dx(*args: Any) -> Tensor:
    """The op ``linear_4bit_dx``, or its kernel alone where that makes no difference."""
    if unobserved():
        dx = native.linear_4bit_dx_on_tensors(args[0], args[1:8], *args[8:], num_threads())
        if dx is not None:
            return dx
    return _linear_4bit_dx_op(*args)


def adamw_step(params: Sequence[Tensor], *args: Any) -> None:
    """The op ``adamw_step`` with all its arguments, or its kernel alone as above.

    Gradients must be off, for nothing looks whether parameters are leaves that require them.
    """
    if unobserved() and native.adamw_step_on_tensors(params, *args, num_threads()):
        _count_as_changed(params, *args[1:5])
    else:
        _adamw_step_op(params, *args)
