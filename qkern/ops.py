"""The ops ``torch.ops.qkern.*``: one table of schemas and shapes, and dispatch to a backend.

``qkern.reference`` documents each op. The ops have no autograd formula of their own; that is
``qkern.autograd``, which costs less per call. They are registered once for all devices:
``backends.select`` looks at the tensor's device at each call, so that a backend can be forced after
tracing too. A user calls ``qkern.functional``, which checks arguments and explains errors; the ops
themselves reject what would be unsafe.

`call` runs an op by the selected backend's function on tensors themselves where nothing would see
the difference: on a small layer, torch's dispatcher takes longer than the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qkern import backends, formats, weight
from qkern.backends import num_threads, select
from qkern.weight import Weight

_FIELDS = len(Weight._fields)


@dataclass(frozen=True)
class Op:
    """One op: its schema, and its fake kernel, which gives the results' shapes to tracers.

    In the schema ``Weight weight`` stands for the fields of `qkern.weight.Weight`. Below the op's
    boundary they are one argument, of the fake kernel, of every backend's function and of
    ``qkern.reference``'s: all of them have the schema's parameters, by position.
    """

    schema: str
    fake: Callable[..., Any]

    @cached_property
    def name(self) -> str:
        """What the schema calls the op."""
        return self.schema.partition("(")[0]

    @cached_property
    def torch_schema(self) -> str:
        """The schema with the fields of the weight."""
        return self.schema.replace("Weight weight", weight.SCHEMA)

    @cached_property
    def weight_at(self) -> int | None:
        """The position of the weight among the arguments."""
        before, found, _ = self.schema.partition("Weight weight")
        return before.count(",") if found else None

    @cached_property
    def defaults(self) -> tuple[Any, ...]:
        """A value for each argument of torch's schema: its default, None where there is none."""
        return tuple(a.default_value for a in self.overload._schema.arguments)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the arguments with the weight as one."""
        names = [a.name for a in self.overload._schema.arguments]
        if self.weight_at is not None:
            names[self.weight_at : self.weight_at + _FIELDS] = ["weight"]
        return tuple(names)

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """The names of the arguments that the op changes in place."""
        arguments = self.overload._schema.arguments
        return tuple(a.name for a in arguments if a.alias_info and a.alias_info.is_write)

    @cached_property
    def overload(self) -> Any:
        """The registered op."""
        return getattr(torch.ops.qkern, self.name).default

    def gather(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of torch's schema with the weight as one, and defaults left out filled in.

        torch leaves out trailing arguments that have their default value.
        """
        args = (*args, *self.defaults[len(args) :])
        at = self.weight_at
        if at is None:
            return args
        return (*args[:at], Weight(*args[at : at + _FIELDS]), *args[at + _FIELDS :])

    def spread(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with the weight as one, for torch's schema."""
        at = self.weight_at
        return tuple(args) if at is None else (*args[:at], *args[at], *args[at + 1 :])

    def canonical(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments with the weight as backends take it."""
        at = self.weight_at
        return args if at is None else (*args[:at], args[at].canonical(), *args[at + 1 :])

    def count_changes(self, args: Sequence[Any]) -> None:
        """Tell autograd of what the op wrote: a kernel's writes go by pointers, unseen."""
        for name in self.writes:
            torch.autograd.graph.increment_version(args[self.parameters.index(name)])

    def run(self, *args: Any) -> Any:
        """The op as torch's dispatcher calls it, by the backend selected for its first tensor."""
        args = self.gather(args)
        first = args[0]
        if isinstance(first, list):
            if not first:
                return None
            first = first[0]
        backend = select(first.device)
        kernel = backend.fast.get(self.name)
        result = None if kernel is None else kernel(*args, num_threads())
        if result is None:
            result = backend.table[self.name](*self.canonical(args))
        if self.writes:
            self.count_changes(args)
            return None
        return result

    def run_fake(self, *args: Any) -> Any:
        """The fake kernel as torch calls it."""
        return self.fake(*self.gather(args))


def _packed_fake(
    x: Tensor, format: str, block_size: int, codebook: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = x.numel()
    return (
        x.new_empty((formats.packed_size(n),), dtype=torch.uint8),
        x.new_empty((formats.num_blocks(n, block_size),), dtype=torch.float32),
    )


def _dense_fake(weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return weight.packed.new_empty(tuple(shape), dtype=dtype)


def _quantize_8bit_fake(x: Tensor, map: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty((formats.num_blocks(x.numel(), block_size),), dtype=torch.float32),
    )


def _dequantize_8bit_fake(
    codes: Tensor, absmax: Tensor, map: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _quantize_absmax_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = formats.num_blocks(absmax.numel(), formats.NESTED_BLOCK_SIZE)
    return (
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty((groups,)),
        absmax.new_empty(()),
    )


def _product_fake(x: Tensor, weight: Weight, features: int, *others: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


def _nothing_fake(*args: object) -> None:
    return None


OPS: Mapping[str, Op] = MappingProxyType(
    {
        op.name: op
        for op in (
            Op(
                "quantize_4bit(Tensor x, str format, int block_size, Tensor? codebook)"
                " -> (Tensor, Tensor)",
                _packed_fake,
            ),
            Op(
                "dequantize_4bit(Weight weight, SymInt[] shape, ScalarType dtype) -> Tensor",
                _dense_fake,
            ),
            Op("dequantize_4bit_out(Weight weight, Tensor(a!) out) -> ()", _nothing_fake),
            Op(
                "quantize_8bit(Tensor x, Tensor map, int block_size) -> (Tensor, Tensor)",
                _quantize_8bit_fake,
            ),
            Op(
                "dequantize_8bit(Tensor codes, Tensor absmax, Tensor map, int block_size,"
                " ScalarType dtype) -> Tensor",
                _dequantize_8bit_fake,
            ),
            Op("quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)", _quantize_absmax_fake),
            Op(
                "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
                " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_absmaxes,"
                " Tensor(e!)[] exp_avg_sq_absmaxes, Tensor factors, int? seed=None,"
                " int[] indices=[], int[] offsets=[]) -> ()",
                _nothing_fake,
            ),
            Op(
                "linear_4bit(Tensor x, Weight weight, SymInt out_features, Tensor? bias=None,"
                " bool batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "linear_4bit_dx(Tensor dy, Weight weight, SymInt in_features,"
                " bool batch_invariant=False) -> Tensor",
                _product_fake,
            ),
        )
    }
)
"""Every op by name: where a new one is declared."""

_library = torch.library.Library("qkern", "DEF")
for _op in OPS.values():
    _library.define(_op.torch_schema)
    _library.impl(_op.name, _op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkern::{_op.name}", _op.run_fake, lib=_library)
    # Found here once: a tracer of `call` cannot enter the lock of a cached_property.
    _found = (_op.overload, _op.weight_at)

_CPU = torch.device("cpu")


def assume() -> bool:
    """Fallback for a private torch query this version lacks; disables the fast path."""
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


def fast(name: str) -> Callable[..., Any] | None:
    """The selected backend's function for the op on CPU tensors themselves, or None.

    It takes the op's arguments, all of them, then how many threads. It answers None with nothing
    done where it declines: a tensor is not plain, no argument is in its place, there is no element.
    Gradients and autocast are the caller's to look after.

    None where somebody would miss the op: tracers, modes, functorch's transforms, profilers and
    forward-mode derivatives.
    """
    if (
        _is_dynamo_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or _is_tracing()
        or _is_profiled()
        or forward_derivatives()
    ):
        return None
    # No entry before the first op has run, whose errors for a wrong choice are the right ones.
    backend = backends.selected.get(_CPU)
    return None if backend is None else backend.fast.get(name)


def call(name: str, *args: Any) -> Any:
    """The op, or its kernel alone where that makes no difference; the weight is one argument."""
    kernel = fast(name)
    if kernel is not None and (result := kernel(*args, num_threads())) is not None:
        return result
    op = OPS[name]
    return op.overload(*op.spread(args))


def adamw_step(*args: Any) -> None:
    """The op ``adamw_step`` with all its arguments, or its kernel alone.

    Gradients must be off, for nothing looks whether parameters are leaves that require them.
    """
    if call("adamw_step", *args) is True:
        OPS["adamw_step"].count_changes(args)
