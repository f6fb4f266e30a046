"""What the op table is made of: cases, and for each op how to run and judge them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qkern import ops, reference
from qkern.weight import Weight, tensors_of

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = tuple(DTYPE_NAMES)

LAYOUTS = ("contiguous", "offset", "rows", "step", "transposed", "expanded")
"""Layouts `with_layout` can give a tensor; the memory around its elements is poisoned."""

CODEBOOKS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "symmetric": tuple((2 * i - 15) / 15 for i in range(16)),
        "unsorted": (0.5, -1.0, 0.25, 0.0, 1.0, -0.75, 0.125, -0.5)
        + (0.75, -0.25, -0.125, 0.375, -0.375, 0.625, -0.625, 0.875),
        "duplicates": (-1.0, -1.0, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0)
        + (0.0, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 1.0),
        "asymmetric": tuple(-0.25 + 1.25 * i / 15 for i in range(16)),
        "without_zero": tuple(0.05 + 0.95 * i / 15 for i in range(16)),
        "negative_zero": (-1.0, -0.7, -0.5, -0.35, -0.2, -0.1, -0.05, -0.0)
        + (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0),
        "wide": tuple((-1.0) ** i * 3.0**i for i in range(16)),
    }
)
"""Custom codebooks that stress the encoder: any order, repeats, no zero, two zeros, beyond ±1."""


@dataclass(frozen=True, slots=True)
class Case:
    """One input of one op.

    `shape` is the op's problem: the tensor's shape for the encoders and decoders, ``(M, N, K)``
    for the matmuls (M rows of activations, a weight of N × K). `codebook` names an entry of
    `CODEBOOKS` and goes with ``format="custom"``. `values` picks the distribution: ``normal``,
    ``special`` (zeros of both signs, subnormals, the largest floats), ``ties`` (each decision
    point and its two neighbours), ``zeros``, ``nonfinite`` (NaN and infinities), for the matmuls'
    activations ``special`` (rows and columns of very different size), ``large``, and ``unused``
    (large where the weights are zero), for block scales ``constant``, ``negative``, ``uneven`` (one
    of a group far larger) and ``halfway`` (`HALFWAY_TAILS`), and for gradients ``huge`` (their
    squares are infinite). `bits` and `stochastic_rounding` are an optimizer step's.
    `rank` is that of a term which a matmul adds. Of a dense product, `accumulate` adds to the
    result's memory, and `mixed` leaves some matrices in float32. `groups` is how many rows each
    expert of a grouped matmul has, one after the other; without it there are three, one of none;
    with `own_results` each has a result of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    block_size: int = 64
    format: str = "nf4"
    codebook: str | None = None
    double_quant: bool = False
    layout: str = "contiguous"
    values: str = "normal"
    bias: bool = False
    batch_invariant: bool = False
    map: str = "signed"
    bits: int = 32
    stochastic_rounding: bool = False
    mixed: bool = False
    accumulate: bool = False
    rank: int = 0
    groups: tuple[int, ...] = ()
    own_results: bool = False

    @property
    def numel(self) -> int:
        """Elements of `shape`."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """The part of a test id after op and backend: ``dtype-shape`` and what is not default."""
        parts = [DTYPE_NAMES[self.dtype], "x".join(map(str, self.shape)) or "scalar"]
        parts += [self.codebook or self.format, f"b{self.block_size}"]
        parts += [
            name
            for name in (
                *("double_quant", "bias", "batch_invariant", "stochastic_rounding"),
                *("mixed", "accumulate", "own_results"),
            )
            if getattr(self, name)
        ]
        parts += [f"{self.bits}bit"] if self.bits != 32 else []
        parts += [f"rank{self.rank}"] if self.rank else []
        parts += ["g" + "+".join(map(str, self.groups))] if self.groups else []
        parts += [value for value in (self.layout, self.values, self.map) if value not in _DEFAULTS]
        return "-".join(parts)


_DEFAULTS = ("contiguous", "normal", "signed")

Inputs = dict[str, Any]
"""An op's arguments by their names in the table of `qkern.ops`: a weight is one argument."""


def _no_flops(case: Case) -> int:
    return 0


def _of_table(name: str) -> OpSpec:
    from qkern.testing.specs import OPS

    return OPS[name]


@dataclass(frozen=True)
class OpSpec:
    """One op: its cases, how to make inputs, how to judge results, what it moves and computes."""

    name: str
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, torch.device, torch.Generator], Inputs]
    """Draws on the CPU with the generator and then moves, so every device sees the same values."""
    comparison: str
    """``"bitwise"``, ``"matmul"`` of a 4-bit weight, ``"grouped"`` of several, or ``"product"`` of
    dense matrices."""
    bytes: Callable[[Case], int]
    """The least the op must read and write, in bytes."""
    flops: Callable[[Case], int] = _no_flops
    """Its multiply-adds counted twice; 0 where bandwidth is the limit."""
    main: str = ""
    """The input that has the case's layout; for a matmul, the activations."""
    input_gradient: bool = False
    """Of a matmul: whether it multiplies by W, not by its transpose."""
    judge: Callable[..., None] | None = None
    """Of a matmul whose factors are rounded, or by experts: raises AssertionError unless the result
    is right, by the inputs and the exact weight, if there is one in 4 bits."""

    def __reduce__(self) -> Any:
        """An entry of the table is itself in another process, too."""
        return _of_table, (self.name,)

    @property
    def op(self) -> ops.Op:
        """The op's entry in the table of `qkern.ops`."""
        return ops.OPS[self.name]

    @property
    def multiplies(self) -> bool:
        """Whether a case's shape is that of a product, (M, N, K), and sums are of floats."""
        return self.comparison != "bitwise"

    @property
    def writes(self) -> tuple[str, ...]:
        """The tensors, or lists of them, that the op changes in place; they are its results."""
        return self.op.writes

    def arguments(self, inputs: Inputs) -> tuple[Any, ...]:
        """The inputs by position, as ``torch.ops.qkern`` takes them."""
        return self.op.spread([inputs[name] for name in self.op.parameters])

    def by_name(self, inputs: Inputs) -> dict[str, Any]:
        """The inputs by the names of torch's schema: a weight's fields are arguments there."""
        names = [argument.name for argument in self.op.overload._schema.arguments]
        return dict(zip(names, self.arguments(inputs), strict=True))

    def rows(self, inputs: Inputs, where: slice) -> Inputs:
        """The inputs of a matmul with some rows of its activations, and of a term's left factor."""
        names = [name for name in (self.main, "left") if name in inputs]
        return inputs | {name: inputs[name][where] for name in names}

    def run(self, inputs: Inputs, in_place: bool = False) -> tuple[Tensor, ...]:
        """The op's results on the backend now selected, through the dispatcher.

        `inputs` stay as they are, what the op changes being copied, unless `in_place`.
        """
        return self._results(
            lambda inputs: self.op.overload(*self.arguments(inputs)), inputs, in_place
        )

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The results `qkern.reference` states, computed on the inputs' own device."""
        function = getattr(reference, self.name)
        return self._results(lambda inputs: function(**inputs), inputs, False)

    def _results(
        self, function: Callable[[Inputs], Any], inputs: Inputs, in_place: bool
    ) -> tuple[Tensor, ...]:
        if not in_place:
            inputs = inputs | {name: map_tensors(inputs[name], _twin) for name in self.writes}
        result = function(inputs)
        if self.writes:
            return tuple(
                tensor for name in self.writes for _, tensor in tensors_of(name, inputs[name])
            )
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def exact_weight(self, inputs: Inputs, case: Case) -> Tensor:
        """Of a matmul: the float32 matrix whose transpose multiplies the activations.

        Of a grouped one: the matrices of all experts, ``[E, ...]``.
        """
        shape = case.shape[1:]
        if self.comparison == "grouped":
            parts = [
                inputs["weight"].of_expert(expert, math.prod(shape))
                for expert in range(len(inputs["offsets"]))
            ]
            dense = [reference.dequantize_4bit(part, shape, torch.float32) for part in parts]
            weight = torch.stack(dense) if dense else torch.empty(0, *shape)
        else:
            weight = reference.dequantize_4bit(inputs["weight"], shape, torch.float32)
        return weight.mT if self.input_gradient else weight

    def id(self, case: Case, target: object) -> str:
        """A test id: ``op-backend-dtype-shape-…``."""
        return f"{self.name}-{target}-{case}"


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """An op's argument with ``function`` of each tensor: of itself, of a weight's or a list's."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Weight):
        return Weight(*(map_tensors(field, function) for field in value))
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    return value


def _twin(tensor: Tensor) -> Tensor:
    """A copy that lies in its storage as `tensor` does, with copies of what is around it."""
    storage = tensor.untyped_storage().clone()
    twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
