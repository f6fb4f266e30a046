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

from qkern import _errors, backends, formats, weight
from qkern._settings import batch_invariance, forced_backend, int8_activations, none_set
from qkern.backends import Backend, num_threads, select
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
    def _written(self) -> tuple[int, ...]:
        return tuple(map(self.parameters.index, self.writes))

    @cached_property
    def overload(self) -> Any:
        """The registered op."""
        return getattr(torch.ops.qkern, self.name).default

    def gather(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of torch's schema with the weight as one."""
        at = self.weight_at
        if at is None:
            return args
        return (*args[:at], Weight(*args[at : at + _FIELDS]), *args[at + _FIELDS :])

    def spread(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with the weight as one, for torch's schema."""
        at = self.weight_at
        return tuple(args) if at is None else (*args[:at], *args[at], *args[at + 1 :])

    def canonical(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with the weight as backends take it."""
        at = self.weight_at
        if at is None or args[at].is_canonical():
            return args
        return (*args[:at], args[at].canonical(), *args[at + 1 :])

    def count_changes(self, args: Sequence[Any]) -> None:
        """Tell autograd of what the op wrote: a kernel's writes go by pointers, unseen."""
        for position in self._written:
            torch.autograd.graph.increment_version(args[position])

    def run_fake(self, *args: Any) -> Any:
        """The fake kernel as torch calls it.

        Raises ``ValueError`` for tensors on several devices: torch takes an op with any tensor on
        meta for one on meta, and would hand out memory that nobody fills.
        """
        from qkern import _inductor  # which imports this module

        _inductor.tell_compiler()
        args = self.gather(args)
        named = [
            found
            for pair in zip(self.parameters, args, strict=False)
            for found in weight.tensors_of(*pair)
        ]
        for name, tensor in named[1:]:
            _errors.check_device(name, tensor, named[0][1].device, named[0][0])
        return self.fake(*args)


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
                " bool? batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "linear_4bit_int8(Tensor x, Weight weight, SymInt out_features,"
                " Tensor? bias=None, bool? batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "linear_4bit_dx(Tensor dy, Weight weight, SymInt in_features,"
                " bool? batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "linear_4bit_add(Tensor x, Weight weight, SymInt out_features, Tensor? bias,"
                " Tensor left, Tensor right, float alpha=1.0, bool? batch_invariant=False)"
                " -> Tensor",
                _product_fake,
            ),
            Op(
                "linear_4bit_dx_add(Tensor dy, Weight weight, SymInt in_features, Tensor left,"
                " Tensor right, float alpha=1.0, bool? batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "grouped_linear_4bit(Tensor x, Weight weight, SymInt out_features, Tensor offsets,"
                " Tensor? bias=None, bool? batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "grouped_linear_4bit_dx(Tensor dy, Weight weight, SymInt in_features,"
                " Tensor offsets, bool? batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "grouped_linear_4bit_add(Tensor x, Weight weight, SymInt out_features,"
                " Tensor offsets, Tensor? bias, Tensor left, Tensor right, float alpha=1.0,"
                " bool? batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "grouped_linear_4bit_dx_add(Tensor dy, Weight weight, SymInt in_features,"
                " Tensor offsets, Tensor left, Tensor right, float alpha=1.0,"
                " bool? batch_invariant=False) -> Tensor",
                _product_fake,
            ),
            Op(
                "grouped_matmul_into(Tensor(a!) out, Tensor a, Tensor b, Tensor offsets,"
                " float alpha=1.0, bool accumulate=False) -> ()",
                _nothing_fake,
            ),
            Op(
                "matmul_into(Tensor(a!) out, Tensor a, Tensor b, float alpha=1.0,"
                " bool accumulate=False) -> ()",
                _nothing_fake,
            ),
        )
    }
)
"""Every op by name: where a new one is declared.

A matmul whose ``batch_invariant`` is None takes what is in force where it runs: in graphs of a
compiler, that is not known before.
"""


_NO_INT8_GRADIENT = (
    'precision: got "int8" where a compiled backward runs; takes it where no tensor requires a '
    "gradient"
)

_NOT_IN_8_BITS = {
    "linear_4bit_dx": _NO_INT8_GRADIENT,
    "linear_4bit_dx_add": _NO_INT8_GRADIENT,
    "linear_4bit_add": 'precision: got "int8" in linear_4bit_add; takes it in linear_4bit',
}
"""What is raised, by op, of the products of one weight that have no form in 8 bits.

Those by experts are computed as usual.
"""

_IN_8_BITS = {"linear_4bit": "linear_4bit_int8"}
"""By op, its form in 8 bits."""


def _implementation(op: Op) -> Callable[..., Any]:
    """The op as torch's dispatcher calls it, by the backend selected for its first tensor."""
    name, writes, at, defaults = op.name, op.writes, op.weight_at, op.defaults
    left_out = [defaults[given:] for given in range(len(defaults) + 1)]
    end = 0 if at is None else at + _FIELDS
    asks = op.parameters[-1] == "batch_invariant"
    not_in_8_bits = _NOT_IN_8_BITS.get(name)

    def run(*args: Any) -> Any:
        # torch leaves out trailing arguments that have their default value.
        args += left_out[len(args)]
        at_run = name
        if asks and args[-1] is None:
            args = (*args[:-1], bool(batch_invariance.get()))
            if int8_activations.get():
                if not_in_8_bits is not None:
                    raise RuntimeError(not_in_8_bits)
                at_run = _IN_8_BITS.get(name, name)
        first = args[0]
        if type(first) is list:
            if not first:
                return None
            first = first[0]
        backend = select(first.device)
        kernel = backend.fast.get(at_run)
        if at is not None:
            # Read as any tuple; the named tuple's own constructor takes longer.
            args = (*args[:at], args[at:end], *args[end:])
        result = None if kernel is None else kernel(*args, num_threads())
        if result is None:
            if at is not None:
                args = op.canonical((*args[:at], Weight._make(args[at]), *args[at + 1 :]))
            result = backend.table[at_run](*args)
        if writes:
            op.count_changes(args)
            return None
        return result

    return run


_library = torch.library.Library("qkern", "DEF")
for _op in OPS.values():
    _library.define(_op.torch_schema)
    # After this the op's properties are known: a tracer cannot enter a cached_property's lock.
    _library.impl(_op.name, _implementation(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkern::{_op.name}", _op.run_fake, lib=_library)

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


def is_traced() -> Any:
    """Whether somebody may look into what is called, or change it."""
    return (
        _is_dynamo_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or _is_tracing()
        or forward_ad._current_level >= 0
    )


def is_watched() -> Any:
    """Whether somebody would miss an op that does not go through the dispatcher."""
    return is_traced() or _is_profiled()


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def undispatched(first: Any) -> Backend | None:
    """The backend whose functions may be called without the dispatcher on ``first``, or None.

    ``first`` is the op's first tensor. None where somebody would miss the op: tracers, modes,
    functorch's transforms, profilers and forward-mode derivatives. What else depends on the
    tensors is the caller's to look after: gradients, autocast, and that they are plain, which
    `Backend.fast` looks after itself.
    """
    if is_traced() or _is_profiled():
        return None
    # Of anything but a plain tensor nothing is asked, for it might notice; no kernel takes it.
    device = _CPU if type(first) not in _PLAIN_TYPES or first.is_cpu else first.device
    # No entry before the first op has run, whose errors for a wrong choice are the right ones.
    if none_set() or (forced := forced_backend.get()) is None:
        return backends.selected.get(device)
    known: Backend | None = forced.selected.get(device)
    return known


def _first_tensor(args: Sequence[Any]) -> Any:
    """Of an op's arguments, in whose first a list or a weight may be; None where it is empty."""
    first = args[0]
    while isinstance(first, list | tuple):
        first = first[0] if first else None
    return first


def _plain_keys() -> frozenset[int]:
    """The dispatch keys of dense CPU tensors that are nothing else besides.

    Other keys are those of subclasses, of lazy conjugates, negatives and zeros, of sparse, nested
    and meta tensors. Empty where torch does not tell keys.
    """
    if not hasattr(torch._C, "_dispatch_keys"):
        return frozenset()
    usual = torch.empty(1, device="cpu")
    with torch.inference_mode():
        in_inference = torch.empty(1, device="cpu")
    return frozenset(torch._C._dispatch_keys(t).raw_repr() for t in (usual, in_inference))


_PLAIN_KEYS = _plain_keys()


def _are_plain(arguments: Sequence[Any]) -> bool:
    """Whether all tensors, in lists and weights too, are dense CPU tensors without gradients."""
    for argument in arguments:
        if isinstance(argument, list | tuple):
            if not _are_plain(argument):
                return False
        elif isinstance(argument, Tensor) and (
            not _PLAIN_KEYS
            or argument.requires_grad
            or torch._C._dispatch_keys(argument).raw_repr() not in _PLAIN_KEYS
        ):
            return False
    return True


def call(name: str, *args: Any) -> Any:
    """The op with all its arguments, the weight as one; undispatched where nobody would know."""
    op = OPS[name]
    result, done = None, False
    if (backend := undispatched(_first_tensor(args))) is not None:
        kernel = backend.fast.get(name)
        if kernel is not None:
            result = kernel(*args, num_threads())
            done = result is not None
        elif _are_plain(args):
            result, done = backend.table[name](*op.canonical(args)), True
    if not done:
        return op.overload(*op.spread(args))
    if op.writes:
        op.count_changes(args)
        return None
    return result


def adamw_step(*args: Any) -> None:
    """The op ``adamw_step`` with all its arguments, or its kernel alone.

    Gradients must be off, for nothing looks whether parameters are leaves that require them.
    """
    call("adamw_step", *args)
