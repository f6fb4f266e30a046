"""The op table: inputs, comparison, bytes and flops of every qkern op.

Tests and benchmarks read this one table, and so may anyone who writes a backend of their own::

    from qkern import testing

    target = testing.Target("mybackend", device_type="cpu")   # a name qkern.backends knows
    testing.register_target(target)
    for spec in testing.OPS.values():
        for case in spec.cases:
            testing.check(spec, case, target)

`check` makes the case's inputs, runs ``torch.ops.qkern.<op>`` on the target and compares with
`qkern.reference`. Two comparisons exist:

- ``"bitwise"`` for everything that encodes or decodes: codes, scales and dequantised values are
  equal bit for bit (a NaN equals any NaN).
- ``"matmul"`` for the fused products: their error against float64 on the exact dequantised
  weights is at most that of dequantising to the activation's dtype and multiplying there, with a
  small margin; `assert_matmul` says it exactly.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import platform
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import qkern.ops  # noqa: F401  registers torch.ops.qkern
from qkern import backends, formats, reference
from qkern.backends import native

__all__ = [
    "CODEBOOKS",
    "ISAS",
    "LAYOUTS",
    "MATMUL_MARGIN",
    "MATMUL_MAX_MARGIN",
    "OPS",
    "Case",
    "MatmulError",
    "OpSpec",
    "Target",
    "assert_bitwise",
    "assert_matmul",
    "check",
    "codebook_tensor",
    "matmul_error",
    "neighbours",
    "poisoned_outputs",
    "register_target",
    "targets",
    "tie_values",
    "with_layout",
]

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = tuple(DTYPE_NAMES)

LAYOUTS = ("contiguous", "offset", "rows", "step", "transposed", "expanded")
"""Layouts `with_layout` can give a tensor; the memory around its elements is poisoned."""

_IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
ISAS = ("scalar", "neon") if _IS_ARM else ("scalar", "avx2", "avx512", "avx512vnni", "amx")
"""Instruction sets of the native CPU backend on this kind of processor, slowest first.

A build or a CPU may lack some.
"""

MATMUL_MARGIN = {torch.float32: 1.25, torch.bfloat16: 1.1, torch.float16: 1.1}
"""How much larger than the baseline's a matmul's root mean square error may be: room for another
order of summation. In 16 bits the rounding of results dominates, and less room is needed."""

MATMUL_MAX_MARGIN = 2.0
"""The same for the largest error, a less steady figure."""

_RMS_MIN_NUMEL = 256
_FLOAT32_ROUNDOFF = 2.0**-24

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
    (large where the weights are zero), and for block scales ``constant``, ``negative`` and
    ``halfway`` (`HALFWAY_TAILS`). `bits` and `stochastic_rounding` are an optimizer step's.
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
            for name in ("double_quant", "bias", "batch_invariant", "stochastic_rounding")
            if getattr(self, name)
        ]
        parts += [f"{self.bits}bit"] if self.bits != 32 else []
        parts += [value for value in (self.layout, self.values, self.map) if value not in _DEFAULTS]
        return "-".join(parts)


_DEFAULTS = ("contiguous", "normal", "signed")

Inputs = dict[str, Any]
"""An op's arguments by the names of its schema."""


@dataclass(frozen=True)
class OpSpec:
    """One op: its cases, how to make inputs, how to judge results, what it moves and computes.

    `make_inputs(case, device, generator)` draws on the CPU with `generator` and then moves, so
    every device sees the same values. `bytes(case)` is the least the op must read and write in
    bytes, `flops(case)` its multiply-adds counted twice (0 where bandwidth is the limit).
    """

    name: str
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, torch.device, torch.Generator], Inputs]
    comparison: str
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    writes: tuple[str, ...] = ()
    """The lists of tensors that the op changes in place; they are its results."""

    def run(self, inputs: Inputs, in_place: bool = False) -> tuple[Tensor, ...]:
        """The op's results on the backend now selected, through the dispatcher.

        `inputs` stay as they are, what the op changes being copied, unless `in_place`.
        """
        return self._results(getattr(torch.ops.qkern, self.name), inputs, in_place)

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The results `qkern.reference` states, computed on the inputs' own device."""
        return self._results(getattr(reference, self.name), inputs, False)

    def _results(
        self, function: Callable[..., Any], inputs: Inputs, in_place: bool
    ) -> tuple[Tensor, ...]:
        if not in_place:
            inputs = inputs | {name: [_twin(t) for t in inputs[name]] for name in self.writes}
        result = function(**inputs)
        if not self.writes:
            return _as_tuple(result)
        return tuple(tensor for name in self.writes for tensor in inputs[name])

    def id(self, case: Case, target: Target) -> str:
        """A test id: ``op-backend-dtype-shape-…``."""
        return f"{self.name}-{target}-{case}"


def _twin(tensor: Tensor) -> Tensor:
    """A copy that lies in its storage as `tensor` does, with copies of what is around it."""
    storage = tensor.untyped_storage().clone()
    twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@dataclass(frozen=True, slots=True)
class Target:
    """A backend, and where it has several, one of its instruction sets.

    `reason` says why the target cannot run here; None means that it can.
    """

    backend: str
    isa: str | None = None
    device_type: str = "cpu"
    reason: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}.{self.isa}"

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Run every qkern op inside the context on this backend and instruction set."""
        with backends.use(self.backend, isa=self.isa):
            yield


_registered_targets: list[Target] = []


def register_target(target: Target) -> None:
    """Add a backend of your own to what `targets` lists; once per name and device type."""
    if any(str(t) == str(target) and t.device_type == target.device_type for t in targets_all()):
        raise ValueError(f"target: got {target}, which is registered already")
    _registered_targets.append(target)


def targets_all() -> list[Target]:
    """Every known target on every device type, available here or not."""
    return [t for device_type in ("cpu", "cuda") for t in targets(device_type)]


def targets(device_type: str = "cpu") -> list[Target]:
    """Every backend of `device_type` with each instruction set, those missing with a reason."""
    found = []
    for name, reason in backends.available(device_type).items():
        if name != "cpu":
            found.append(Target(name, None, device_type, reason))
            continue
        built = () if reason else tuple(native.available_isas())
        for isa in (*ISAS, *(isa for isa in built if isa not in ISAS)):
            missing = reason or (None if isa in built else f"this build or CPU has no {isa}")
            found.append(Target(name, isa, device_type, missing))
    return found + [t for t in _registered_targets if t.device_type == device_type]


def codebook_tensor(case: Case, device: torch.device | str | None = None) -> Tensor | None:
    """The case's custom codebook, float32 ``[16]``, or None where its format has a table."""
    if case.codebook is None:
        return None
    return torch.tensor(CODEBOOKS[case.codebook], dtype=torch.float32, device=device)


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill what torch allocates with NaN (integers: their maximum) while the context lasts.

    So an element that a kernel forgot to write never passes for a result.
    """
    deterministic: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


def _poison(shape: Sequence[int], like: Tensor) -> Tensor:
    value = math.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, with poison between and around them.

    ``offset`` starts one element into its storage (misaligned for vectors), ``rows`` has gaps
    between rows, ``step`` has a gap after every element, ``transposed`` is column-major and
    ``expanded`` repeats the first row with stride 0 (the only layout that changes values). A
    tensor with too few dimensions for the layout gets ``offset``.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}; takes one of {', '.join(LAYOUTS)}")
    if layout == "step" and tensor.ndim > 0:
        storage = _poison((*tensor.shape, 2), tensor)
        view = storage[..., 0]
    elif layout == "rows" and tensor.ndim > 1:
        storage = _poison((*tensor.shape[:-1], tensor.shape[-1] + 5), tensor)
        view = storage[..., 1 : tensor.shape[-1] + 1]
    elif layout == "transposed" and tensor.ndim > 1:
        view = _poison(tensor.mT.shape, tensor).mT
    elif layout == "expanded" and tensor.ndim > 1:
        return tensor[:1].expand(tensor.shape)
    else:
        view = _poison((tensor.numel() + 2,), tensor)[1 : tensor.numel() + 1].view(tensor.shape)
    return view.copy_(tensor)


_INT_OF = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def neighbours(values: Tensor, steps: int = 1) -> Tensor:
    """The `steps` floats below and above each finite value, and the value: ``[…, 2·steps + 1]``.

    Neighbours are in the value's own dtype; both zeros count as one.
    """
    integers = values.contiguous().view(_INT_OF[values.dtype]).long()
    sign_bit = 1 << (8 * values.element_size() - 1)
    magnitude = integers & (sign_bit - 1)
    ordered = torch.where(integers < 0, -magnitude, magnitude)
    ordered = ordered[..., None] + torch.arange(-steps, steps + 1, device=values.device)
    bits = torch.where(ordered < 0, -ordered - sign_bit, ordered)
    return bits.to(_INT_OF[values.dtype]).view(values.dtype)


def tie_values(
    codes: Sequence[float], absmax: Tensor, dtype: torch.dtype, block_size: int
) -> Tensor:
    """Blocks whose elements sit at, just below and just above the points where codes change.

    `codes` is the code table, `absmax` float32 ``[a]`` the scales to try. Every block starts with
    its scale, so the block's absmax is the scale rounded to `dtype`. Returns ``[blocks,
    block_size]``; short ends are filled with zeros.
    """
    table = torch.tensor(sorted(codes), dtype=torch.float32)
    points = (table[1:] + table[:-1]) * 0.5
    points = points[(points.abs() <= 1) & (points != 0)]
    points = torch.cat([points, -points]) if table[0] >= 0 else points
    scales = absmax.to(dtype).float()
    ties = neighbours((points * scales[:, None]).to(dtype)).flatten(1)
    ties = ties.where(ties.float().abs() <= scales[:, None], 0)
    per_block = block_size - 1
    groups = -(-ties.shape[1] // per_block)
    ties = torch.nn.functional.pad(ties, (0, groups * per_block - ties.shape[1]))
    ties = ties.view(len(absmax), groups, per_block)
    heads = absmax.to(dtype)[:, None, None].expand(-1, groups, 1)
    return torch.cat([heads, ties], dim=2).flatten(0, 1)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator)


def _special(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Runs of 32 values, each of one magnitude: the extremes of `dtype`, zeros of both signs."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    scales = [1.0, 0.0, -0.0, tiny, tiny * 0.25, tiny * info.eps, info.max, info.max * 0.25, 1e-20]
    n = math.prod(shape)
    runs = -(-n // 32)
    picks = torch.tensor(scales)[torch.randint(len(scales), (runs, 1), generator=generator)]
    values = (_normal((runs, 32), generator) * 0.4).clamp(-1, 1) * picks
    holes = torch.rand((runs, 32), generator=generator)
    values = values.where(holes > 0.05, 0.0).where(holes > 0.02, -0.0)
    return values.flatten()[:n].reshape(tuple(shape)).to(dtype)


def _scatter(values: Tensor, specials: Sequence[float], generator: torch.Generator) -> Tensor:
    """Each of `specials` in turn put at about every 200th place, the first at a random one."""
    flat = values.flatten()
    places = torch.randperm(len(flat), generator=generator)[: max(1, len(flat) // 200)]
    for place, special in zip(places.tolist(), itertools.cycle(specials), strict=False):
        flat[place] = special
    return flat.view(values.shape)


def _source(case: Case, table: Sequence[float], generator: torch.Generator) -> Tensor:
    """What an encoder is given, `case.shape` in `case.dtype`, on the CPU."""
    if case.values == "special":
        return _special(case.shape, case.dtype, generator)
    if case.values == "zeros":
        return torch.zeros(case.shape, dtype=case.dtype)
    if case.values == "ties":
        absmax = torch.exp2(6 * _normal((1 + case.numel // case.block_size,), generator))
        absmax[::3] = absmax[::3].log2().round().exp2()
        ties = tie_values(table, absmax, case.dtype, case.block_size).flatten()
        return ties[: case.numel].reshape(case.shape)
    values = _normal(case.shape, generator).to(case.dtype)
    if case.values == "nonfinite" and case.numel:
        return _scatter(values, (math.nan, math.inf, -math.inf), generator)
    return values


HALFWAY_TAILS = {4: (2.0**-53, 2.0**-60), 8: (2.0**-52, 2.0**-53), 16: (2.0**-53, 0.0)}
"""The last terms of a sum, by its length, whose mean lies next to the middle of two floats: whether
its sum is rounded up to a float64 decides."""


def _scales(n: int, values: str, generator: torch.Generator) -> Tensor:
    """`n` block scales, float32."""
    scales = _normal((n,), generator).abs() * 0.02 + 0.03
    if values == "special":
        tiny = torch.finfo(torch.float32).smallest_normal
        extremes = torch.tensor([0.0, tiny, tiny * 0.25, 2.0**-149, 3e38, 6e4, 7e4, 1e-6, -0.5])
        picks = torch.randint(2 * len(extremes), (n,), generator=generator)
        scales = scales.where(picks >= len(extremes), extremes[picks % len(extremes)])
    elif values == "zeros":
        scales.zero_()
    elif values == "constant":
        scales.fill_(0.1)
    elif values == "negative":
        scales.neg_()
    elif values == "halfway":
        scales.zero_()
        scales[:4] = torch.tensor([1.0, 2.0**-24, *HALFWAY_TAILS[n]])
    elif values == "nonfinite" and n:
        scales = _scatter(scales, (math.nan, math.inf), generator)
    return scales


def _place(inputs: Inputs, case: Case, device: torch.device, main: str) -> Inputs:
    """Move to `device`; give `main` the case's layout and misalign the other tensors with it."""
    other = "contiguous" if case.layout == "contiguous" else "offset"
    placed = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = with_layout(value.to(device), case.layout if name == main else other)
        elif isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
            value = [with_layout(item.to(device), other) for item in value]
        placed[name] = value
    return placed


def _weight(case: Case, n: int, generator: torch.Generator) -> Inputs:
    """Random 4-bit storage of `n` elements; the codes are uniform, the scales plausible."""
    blocks = formats.num_blocks(n, case.block_size)
    inputs: Inputs = {
        "packed": torch.randint(
            256, (formats.packed_size(n),), dtype=torch.uint8, generator=generator
        ),
        "absmax": None,
        "nested_absmax": None,
        "nested_offset": None,
        "codebook": codebook_tensor(case),
        "format": case.format,
        "block_size": case.block_size,
    }
    if case.double_quant:
        nested = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
        inputs["absmax"] = torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator)
        inputs["nested_absmax"] = _scales(nested, case.values, generator) * 0.5
        inputs["nested_offset"] = torch.tensor(0.05)
    else:
        inputs["absmax"] = _scales(blocks, case.values, generator)
    return inputs


def _code_table(case: Case) -> Sequence[float]:
    if case.codebook is not None:
        return CODEBOOKS[case.codebook]
    return formats.NF4_CODES if case.format == "nf4" else formats.FP4_MAGNITUDES


def _quantize_4bit_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs = {
        "x": _source(case, _code_table(case), generator),
        "format": case.format,
        "block_size": case.block_size,
        "codebook": codebook_tensor(case),
    }
    return _place(inputs, case, device, "x")


def _dequantize_4bit_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs = _weight(case, case.numel, generator) | {"shape": list(case.shape), "dtype": case.dtype}
    return _place(inputs, case, device, "packed")


def _map_values(case: Case) -> Sequence[float]:
    signed = case.map == "signed"
    return formats.DYNAMIC_MAP_SIGNED if signed else formats.DYNAMIC_MAP_UNSIGNED


def _quantize_8bit_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs = {
        "x": _source(case, _map_values(case), generator),
        "code": formats.map_tensor(case.map),
        "block_size": case.block_size,
    }
    return _place(inputs, case, device, "x")


def _dequantize_8bit_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    blocks = formats.num_blocks(case.numel, case.block_size)
    inputs = {
        "codes": torch.randint(256, case.shape, dtype=torch.uint8, generator=generator),
        "absmax": _scales(blocks, case.values, generator),
        "code": formats.map_tensor(case.map),
        "block_size": case.block_size,
        "dtype": case.dtype,
    }
    return _place(inputs, case, device, "codes")


def _quantize_absmax_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    return _place({"absmax": _scales(case.numel, case.values, generator)}, case, device, "absmax")


def _matmul_inputs(
    case: Case, device: torch.device, generator: torch.Generator, main: str, size: str
) -> Inputs:
    rows, out_features, in_features = case.shape
    inner, outer = (in_features, out_features) if main == "x" else (out_features, in_features)
    x = _normal((rows, inner), generator)
    if case.values == "special":
        # Rows of very different size, and columns of outliers, as real activations have.
        x = x * torch.exp2(4 * _normal((rows, 1), generator)).clamp(2**-8, 2**6)
        x[:, ::37] *= 50
    elif case.values == "large":
        # Near the end of the dtype's range, which sums of unscaled products would leave.
        x = x.clamp(-2, 2) * (torch.finfo(case.dtype).max / 128)
    elif case.values == "unused":
        # Large where all weights are zero, below: a rounding of x beside them must not show.
        x[:, ::16] *= 1e4
    inputs: Inputs = {main: x.to(case.dtype)}
    inputs |= _weight(replace(case, values="normal"), out_features * in_features, generator)
    if case.values == "unused":
        zero = {"nf4": 7, "fp4": 0}[case.format]
        packed = inputs["packed"].view(out_features, in_features // 2)
        if main == "x":
            packed[:, ::8] = packed[:, ::8] & 15 | zero << 4
        else:
            packed[::16] = zero << 4 | zero
    inputs |= {size: outer, "batch_invariant": case.batch_invariant}
    if main == "x":
        bias = _normal((outer,), generator).to(case.dtype)
        inputs["bias"] = bias if case.bias else None
    return _place(inputs, case, device, main)


def _linear_4bit_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    return _matmul_inputs(case, device, generator, "x", "out_features")


def _linear_4bit_dx_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    return _matmul_inputs(case, device, generator, "dy", "in_features")


# Beside the case's shape: a block and a bit, less than any register, and one that is skipped.
_ADAMW_SHAPES = ((257,), (1,), (3, 5), (300,))
_SHRINKING = (3, 5)
"""Whose moments become smaller than what a kernel might read beyond them."""
_ADAMW_INDICES = (1, 4, 7, 10, 13)


def _adamw_step_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs: Inputs = {"params": [], "grads": [], "exp_avgs": [], "exp_avg_sqs": []}
    inputs |= {"exp_avg_absmaxes": [], "exp_avg_sq_absmaxes": []}
    for shape in (case.shape, *_ADAMW_SHAPES):
        of_shape = replace(case, shape=shape, dtype=torch.float32)
        grad = _source(replace(of_shape, dtype=case.dtype), (), generator)
        moments = [_source(of_shape, (), generator) * 0.1, _source(of_shape, (), generator) ** 2]
        if shape == _SHRINKING:
            grad = (moments[0] * 5).to(case.dtype)  # its gradients are scaled by -1.3
        inputs["params"].append(_normal(shape, generator).to(case.dtype))
        inputs["grads"].append(grad)
        names = (("exp_avg", "signed"), ("exp_avg_sq", "unsigned"))
        for (name, map), moment in zip(names, moments, strict=True):
            if case.bits == 8:
                code = formats.map_tensor(map)
                moment, absmax = reference.quantize_8bit(moment, code, formats.STATE_BLOCK_SIZE)
                inputs[f"{name}_absmaxes"].append(absmax)
            inputs[f"{name}s"].append(moment)
    factors = torch.full((_ADAMW_INDICES[-1] + 1, reference.ADAMW_FACTORS), math.nan)
    for k, index in enumerate(_ADAMW_INDICES):
        # Each row is as no other, so that a wrong one shows.
        skip = index == _ADAMW_INDICES[-1]
        row = (torch.tensor([3.0 + k]), 1e-2 * (k + 1), 0.9, 0.99, 1e-8, 0.1, 0.7 - k, skip)
        factors[index] = reference.adamw_factors(*row)[0]
    inputs["factors"] = factors
    inputs["seed"] = 0x12345678 if case.stochastic_rounding else None
    inputs["indices"] = list(_ADAMW_INDICES)
    inputs["offsets"] = [(1 << 33) + 256 * k for k in range(len(_ADAMW_INDICES))]
    return _place(inputs, case, device, "")


def _adamw_step_cases() -> tuple[Case, ...]:
    cases = []
    for dtype, bits in itertools.product(DTYPES, (32, 8)):
        base = Case((), dtype, block_size=formats.STATE_BLOCK_SIZE, bits=bits)
        cases += [replace(base, shape=shape) for shape in (*FLAT_SHAPES, BIG_SHAPE, (70_001,))]
        for values in ("special", "zeros", "nonfinite"):
            cases.append(replace(base, shape=(5, 515), values=values))
        cases.append(replace(base, shape=(7, 333), layout="offset"))
        random = replace(base, stochastic_rounding=True)
        cases += [replace(random, shape=(3, 1111)), replace(random, shape=(70_001,))]
        cases.append(replace(random, shape=(5, 515), values="nonfinite"))
    return _unique(cases)


def _adamw_step_bytes(case: Case) -> int:
    numels = [math.prod(shape) for shape in (case.shape, *_ADAMW_SHAPES)]
    states = 16 * sum(numels)
    if case.bits == 8:
        blocks = sum(formats.num_blocks(n, formats.STATE_BLOCK_SIZE) for n in numels)
        states = 4 * sum(numels) + 16 * blocks
    factors = 4 * reference.ADAMW_FACTORS * (_ADAMW_INDICES[-1] + 1)
    return factors + states + 3 * sum(numels) * case.dtype.itemsize


def _weight_bytes(n: int, case: Case) -> int:
    blocks = formats.num_blocks(n, case.block_size)
    if not case.double_quant:
        return formats.packed_size(n) + 4 * blocks
    nested = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
    return formats.packed_size(n) + blocks + 4 * nested + 4


def _quantize_4bit_bytes(case: Case) -> int:
    blocks = formats.num_blocks(case.numel, case.block_size)
    return case.numel * case.dtype.itemsize + formats.packed_size(case.numel) + 4 * blocks


def _dequantize_4bit_bytes(case: Case) -> int:
    return _weight_bytes(case.numel, case) + case.numel * case.dtype.itemsize


def _8bit_bytes(case: Case) -> int:
    blocks = formats.num_blocks(case.numel, case.block_size)
    return case.numel * (case.dtype.itemsize + 1) + 4 * blocks + 4 * 256


def _quantize_absmax_bytes(case: Case) -> int:
    return 5 * case.numel + 4 * formats.num_blocks(case.numel, formats.NESTED_BLOCK_SIZE) + 4


def _matmul_bytes(case: Case) -> int:
    rows, out_features, in_features = case.shape
    activations = rows * (out_features + in_features) + (out_features if case.bias else 0)
    return _weight_bytes(out_features * in_features, case) + activations * case.dtype.itemsize


def _matmul_flops(case: Case) -> int:
    return 2 * math.prod(case.shape)


def _no_flops(case: Case) -> int:
    return 0


FLAT_SHAPES = ((0,), (1,), (2,), (63,), (64,), (65,), (3, 7), (5, 128), (129, 33), (3, 1111))
BIG_SHAPE = (61, 1030)
ROWS = (0, 1, 2, 3, 5, 8, 13, 16, 17, 33, 64, 129, 300)
WEIGHT_SHAPES = (
    *((1, 64), (1, 1), (3, 7), (64, 1), (33, 65), (64, 64)),
    *((65, 127), (16, 1000), (130, 33), (128, 256), (100, 385)),
)
# Rows of whole blocks, as real models have: kernels may take a faster path there.
ALIGNED_SHAPES = (
    *((5, 32), (13, 96), (40, 160), (37, 384), (3, 416), (66, 640), (7, 1056), (2, 4224)),
    *((384, 32), (1057, 64), (4100, 32)),
)
# Around the tiles of tensor-core kernels: (rows, N, K), whole tiles and parts of them.
TILE_SHAPES = (
    *((17, 128, 128), (64, 256, 384), (128, 128, 256), (129, 384, 128), (130, 136, 160)),
    *((33, 120, 224), (65, 264, 96), (100, 520, 64), (128, 130, 288), (63, 72, 544)),
)
# Longer and wider than any panel or segment that a kernel is likely to keep.
LONG_SHAPES = ((2, 3, 132_096), (8, 260, 16_448), (3, 16_448, 96), (8, 66_000, 32))


def _table_formats() -> tuple[Case, ...]:
    return (
        Case((), format="nf4"),
        Case((), format="fp4"),
        Case((), format="custom", codebook="unsorted"),
    )


def _quantize_4bit_cases() -> tuple[Case, ...]:
    cases = []
    for dtype, base in itertools.product(DTYPES, _table_formats()):
        base = replace(base, dtype=dtype)
        cases += [replace(base, shape=shape) for shape in FLAT_SHAPES]
        cases += [replace(base, shape=(3, 1111), block_size=bs) for bs in formats.BLOCK_SIZES]
        cases += [
            replace(base, shape=BIG_SHAPE, values=values, block_size=bs)
            for values in ("special", "ties", "zeros", "nonfinite")
            for bs in (32, 64, 512)
        ]
    for dtype, layout in itertools.product(DTYPES, LAYOUTS[1:]):
        cases.append(Case((17, 99), dtype, layout=layout))
        cases.append(Case((4, 5, 33), dtype, layout=layout, format="fp4", block_size=32))
    for name, values in itertools.product(CODEBOOKS, ("normal", "special", "ties")):
        cases.append(Case((37, 131), format="custom", codebook=name, values=values))
    return _unique(cases)


def _dequantize_4bit_cases() -> tuple[Case, ...]:
    cases = []
    for dtype, base, dq in itertools.product(DTYPES, _table_formats(), (False, True)):
        base = replace(base, dtype=dtype, double_quant=dq)
        cases += [replace(base, shape=shape) for shape in FLAT_SHAPES]
        cases += [replace(base, shape=(3, 1111), block_size=bs) for bs in formats.BLOCK_SIZES]
        cases += [
            replace(base, shape=BIG_SHAPE, values=values, block_size=32)
            for values in ("normal", "special", "zeros", "nonfinite")
        ]
    for dtype, dq in itertools.product(DTYPES, (False, True)):
        cases.append(Case((17, 99), dtype, layout="offset", double_quant=dq))
    cases += [Case((37, 131), format="custom", codebook=name) for name in CODEBOOKS]
    return _unique(cases)


def _8bit_cases(values: Sequence[str]) -> tuple[Case, ...]:
    cases = []
    for dtype, name in itertools.product(DTYPES, formats.MAPS):
        base = Case((), dtype, block_size=256, map=name)
        cases += [replace(base, shape=shape) for shape in FLAT_SHAPES]
        cases += [replace(base, shape=(3, 1111), block_size=bs) for bs in formats.BLOCK_SIZES]
        cases += [replace(base, shape=BIG_SHAPE, values=v, block_size=32) for v in values]
    cases += [
        Case((17, 99), dtype, layout=layout)
        for dtype, layout in itertools.product(DTYPES, LAYOUTS[1:])
    ]
    return _unique(cases)


def _quantize_absmax_cases() -> tuple[Case, ...]:
    sizes = (1, 2, 3, 255, 256, 257, 1000, 16_384, 70_001)
    cases = [Case((n,)) for n in sizes]
    cases += [
        Case((n,), values=values)
        for n in (1, 300, 5000)
        for values in ("special", "zeros", "constant", "nonfinite")
    ]
    cases += [Case((n,), values="negative") for n in (1, 300)]
    cases += [Case((n,), values="halfway") for n in HALFWAY_TAILS]
    cases += [Case((300,), layout=layout) for layout in ("offset", "step")]
    return tuple(cases)


def _matmul_cases(with_bias: bool) -> tuple[Case, ...]:
    """Every dtype with every row count and every weight shape.

    Formats, block sizes, double quantisation and bias rotate through them.
    """
    variants = itertools.cycle(
        Case((), **keywords)
        for keywords in (
            {"double_quant": True, "bias": with_bias},
            {"format": "fp4", "block_size": 32},
            {"block_size": 128, "bias": with_bias},
            {"double_quant": True, "format": "custom", "codebook": "unsorted"},
            {"block_size": 4096},
            {"double_quant": True, "format": "fp4", "block_size": 256, "bias": with_bias},
            {"format": "custom", "codebook": "asymmetric", "block_size": 32, "bias": with_bias},
        )
    )
    cases = []
    for dtype in DTYPES:
        for rows, (n, k) in itertools.product(ROWS, ((37, 130), (96, 256))):
            cases.append(replace(next(variants), shape=(rows, n, k), dtype=dtype))
        for (n, k), rows in itertools.product(WEIGHT_SHAPES, (1, 4, 21)):
            cases.append(replace(next(variants), shape=(rows, n, k), dtype=dtype))
        for layout, rows in itertools.product(LAYOUTS[1:], (1, 6, 40)):
            case = replace(next(variants), dtype=dtype, layout=layout)
            cases.append(replace(case, shape=(rows, 35, 99)))
            cases.append(replace(case, shape=(rows, 35, 192), block_size=64))
        for index, (n, k) in enumerate(ALIGNED_SHAPES):
            for rows in (1 + index % 8, 1 + (index + 3) % 8, 1 + (index + 5) % 8, 21):
                block_size = 64 if k % 64 == 0 and index % 2 else 32
                case = replace(next(variants), shape=(rows, n, k), dtype=dtype)
                cases.append(replace(case, block_size=block_size))
        cases += [
            Case(shape, dtype, block_size=32, double_quant=dq)
            for shape, dq in zip(LONG_SHAPES, (True, False, True, False), strict=True)
        ]
        cases += [replace(next(variants), shape=shape, dtype=dtype) for shape in TILE_SHAPES]
        cases += [
            Case((7, 48, 520), dtype, block_size, double_quant=True)
            for block_size in formats.BLOCK_SIZES
        ]
        for rows in (1, 4, 9, 70):
            cases.append(Case((rows, 96, 512), dtype, values="special", bias=with_bias))
            cases.append(Case((rows, 96, 512), dtype, values="large"))
            cases.append(Case((rows, 96, 512), dtype, values="unused"))
            cases.append(Case((rows, 37, 130), dtype, batch_invariant=True, bias=with_bias))
    return _unique(cases)


def _unique(cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple(dict.fromkeys(cases))


OPS: Mapping[str, OpSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            OpSpec(
                "quantize_4bit",
                _quantize_4bit_cases(),
                _quantize_4bit_inputs,
                "bitwise",
                _quantize_4bit_bytes,
                _no_flops,
            ),
            OpSpec(
                "dequantize_4bit",
                _dequantize_4bit_cases(),
                _dequantize_4bit_inputs,
                "bitwise",
                _dequantize_4bit_bytes,
                _no_flops,
            ),
            OpSpec(
                "quantize_8bit",
                _8bit_cases(("special", "ties", "zeros", "nonfinite")),
                _quantize_8bit_inputs,
                "bitwise",
                _8bit_bytes,
                _no_flops,
            ),
            OpSpec(
                "dequantize_8bit",
                _8bit_cases(("special", "zeros", "nonfinite")),
                _dequantize_8bit_inputs,
                "bitwise",
                _8bit_bytes,
                _no_flops,
            ),
            OpSpec(
                "quantize_absmax",
                _quantize_absmax_cases(),
                _quantize_absmax_inputs,
                "bitwise",
                _quantize_absmax_bytes,
                _no_flops,
            ),
            OpSpec(
                "adamw_step",
                _adamw_step_cases(),
                _adamw_step_inputs,
                "bitwise",
                _adamw_step_bytes,
                _no_flops,
                (
                    *("params", "exp_avgs", "exp_avg_sqs"),
                    *("exp_avg_absmaxes", "exp_avg_sq_absmaxes"),
                ),
            ),
            OpSpec(
                "linear_4bit",
                _matmul_cases(with_bias=True),
                _linear_4bit_inputs,
                "matmul",
                _matmul_bytes,
                _matmul_flops,
            ),
            OpSpec(
                "linear_4bit_dx",
                _matmul_cases(with_bias=False),
                _linear_4bit_dx_inputs,
                "matmul",
                _matmul_bytes,
                _matmul_flops,
            ),
        )
    }
)
"""Every op by name: the one list that tests and benchmarks read."""


def assert_bitwise(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Raise AssertionError unless shapes, dtypes and bits are equal; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if actual.is_floating_point():
        integer = _INT_OF[actual.dtype]
        different = actual.view(integer) != expected.view(integer)
        different &= ~(actual.isnan() & expected.isnan())
    else:
        different = actual != expected
    count = int(different.sum())
    if count:
        place = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {count} of {different.numel()} differ, first at {place}: "
            f"{actual[place].item()!r}, not {expected[place].item()!r}"
        )


@dataclass(frozen=True, slots=True)
class MatmulError:
    """Errors of a product, each divided by ``|x| · |Wᵀ| + |bias|`` of its element."""

    rms: float
    max: float


def matmul_error(y: Tensor, exact: Tensor, scale: Tensor) -> MatmulError:
    """The error of `y` against `exact`, in units of `scale`; all ``[M, N]``, the last two float64.

    Elements whose exact value is not finite are left out.
    """
    error = ((y.double() - exact).abs() / scale)[exact.isfinite() & (scale > 0)]
    if not error.numel():
        return MatmulError(0.0, 0.0)
    return MatmulError(error.square().mean().sqrt().item(), error.max().item())


def assert_matmul(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raise AssertionError unless ``y = x · weightᵀ + bias`` is as exact as qkern promises.

    x is ``[M, K]`` in float32, bfloat16 or float16, `weight` the float32 ``[N, K]`` exact
    dequantised weight, bias ``[N]`` in x's dtype. The baseline rounds the weight to x's dtype,
    multiplies and adds in float32 and rounds once. Errors are taken against float64 and in units of
    ``|x| · |weightᵀ| + |bias|``:

    - the root mean square is at most `MATMUL_MARGIN` times the baseline's plus half a float32 unit,
      where at least 256 elements make it a steady figure;
    - the largest is at most `MATMUL_MAX_MARGIN` times the baseline's plus one rounding.

    In float32 the order of summation is all that differs, and torch's changes with the shape; there
    the baseline is torch's product or a plain sum from left to right, whichever is worse.

    Where the exact result is not finite, or overflows x's dtype, y must be that same value.
    """
    dtype = x.dtype
    assert y.dtype == dtype, f"dtype {y.dtype}, not {dtype}"
    shape = (*x.shape[:-1], weight.shape[0])
    assert y.shape == shape, f"shape {tuple(y.shape)}, not {shape}"
    if not y.numel():
        return
    x, y, weight = x.detach().cpu(), y.detach().cpu(), weight.detach().cpu()
    bias = torch.zeros(shape[-1], dtype=dtype) if bias is None else bias.detach().cpu()

    exact = x.double() @ weight.double().mT + bias.double()
    scale = x.double().abs() @ weight.double().abs().mT + bias.double().abs()
    baseline = (x.float() @ weight.to(dtype).float().mT + bias.float()).to(dtype)
    overflow = ~exact.to(dtype).isfinite()
    if overflow.any():
        assert_bitwise(y[overflow], exact.to(dtype)[overflow], "results that are not finite")
        exact = exact.masked_fill(overflow, math.nan)
    assert y[~overflow].isfinite().all(), "a result is not finite where the exact one is"

    ours, theirs = matmul_error(y, exact, scale), matmul_error(baseline, exact, scale)
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() / scale).nan_to_num(0).max().item()
    fault = _too_large(ours, theirs, dtype, rounding, y.numel())
    if fault and dtype == torch.float32:
        plain = matmul_error(_left_to_right(x, weight) + bias, exact, scale)
        theirs = MatmulError(max(theirs.rms, plain.rms), max(theirs.max, plain.max))
        fault = _too_large(ours, theirs, dtype, rounding, y.numel())
    assert not fault, fault


def _too_large(
    ours: MatmulError, theirs: MatmulError, dtype: torch.dtype, rounding: float, numel: int
) -> str | None:
    """What is wrong with `ours`, or None; `rounding` is one rounding of the largest result."""
    floor = max(rounding, _FLOAT32_ROUNDOFF)
    if ours.max > MATMUL_MAX_MARGIN * theirs.max + floor:
        allowed = f"{MATMUL_MAX_MARGIN} times {theirs.max:.3g} plus {floor:.3g}"
        return f"largest error {ours.max:.3g}; the baseline's allows {allowed}"
    margin = MATMUL_MARGIN[dtype]
    if numel >= _RMS_MIN_NUMEL and ours.rms > margin * theirs.rms + _FLOAT32_ROUNDOFF / 2:
        return f"rms error {ours.rms:.3g}; the baseline's allows {margin} times {theirs.rms:.3g}"
    return None


def _left_to_right(x: Tensor, weight: Tensor) -> Tensor:
    """``x · weightᵀ`` in float32, summed from left to right in runs of 512 terms."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[1], 512):
        run = torch.zeros_like(total)
        for k in range(start, min(start + 512, x.shape[1])):
            run.addcmul_(x[:, k, None], weight[:, k])
        total += run
    return total


def _generator(spec: OpSpec, case: Case) -> torch.Generator:
    seed = zlib.crc32(f"{spec.name}-{case}".encode())
    return torch.Generator().manual_seed(seed)


@functools.lru_cache(maxsize=4)
def _prepare(name: str, case: Case, device: str) -> tuple[Inputs, tuple[Tensor, ...]]:
    """A case's inputs and what is expected of them; for a matmul, the exact weight.

    The last few are kept: tests run one case on every target in turn.
    """
    spec = OPS[name]
    inputs = spec.make_inputs(case, torch.device(device), _generator(spec, case))
    if spec.comparison == "bitwise":
        return inputs, spec.reference(inputs)
    weight = reference.dequantize_4bit(
        inputs["packed"],
        inputs["absmax"],
        inputs["nested_absmax"],
        inputs["nested_offset"],
        inputs["codebook"],
        case.format,
        case.block_size,
        case.shape[1:],
        torch.float32,
    )
    return inputs, (weight,)


def check(
    spec: OpSpec, case: Case, target: Target, device: torch.device | str | None = None
) -> None:
    """Run `case` on `target` with poisoned outputs; raise AssertionError where it is wrong.

    `device` defaults to the target's device type. The inputs depend only on op and case.
    """
    inputs, expected = _prepare(spec.name, case, str(device or target.device_type))
    with target.activate(), poisoned_outputs():
        actual = spec.run(inputs)
    if spec.comparison == "bitwise":
        assert len(actual) == len(expected), f"{len(actual)} results, not {len(expected)}"
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_bitwise(a, e, f"{spec.name} result {index}")
        return
    weight = expected[0] if spec.name == "linear_4bit" else expected[0].mT
    x = inputs["x"] if spec.name == "linear_4bit" else inputs["dy"]
    assert_matmul(actual[0], x, weight, inputs.get("bias"))
