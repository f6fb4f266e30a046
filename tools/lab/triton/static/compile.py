"""Compiles what the Triton backend would launch for a call on a device that is not here.

The backend runs on CPU tensors with a stub for Triton's driver; Triton's own binder specialises
each launch, compiles it for the stub's target and returns before it would start. So what is
examined is what a user gets, arguments' alignment included.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.triton.on_cpu import backend_for
from qkern import backends, formats, reference
from qkern.weight import Weight

NVIDIA = (75, 80, 86, 89, 90, 100, 120)
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
ARCHITECTURES: tuple[int | str, ...] = NVIDIA + AMD
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PROCESSORS = 100
"""Of the devices compiled for; no tile depends on it, only in how many parts a matmul is split."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as compiled for one architecture; ``asm`` by kind, ``"ptx"`` and so on."""

    name: str
    asm: dict[str, Any]
    shared_bytes: int
    num_warps: int
    arguments: dict[str, Any]
    """Those of the launch by the kernel's parameters; tensors as they were."""
    constants: frozenset[str]
    """Parameters that are part of the code."""
    grid: tuple[int, ...]


class _Driver:
    """As much of a driver as compiling asks for. Each architecture is a device of its own."""

    def __init__(self, arch: int | str) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        kind, warp_size = ("cuda", 32) if arch in NVIDIA else ("hip", 64 if is_cdna(arch) else 32)
        self.target = GPUTarget(kind, arch, warp_size)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return ARCHITECTURES.index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def is_cdna(arch: int | str) -> bool:
    """Whether AMD's architecture has warps of 64."""
    return str(arch).startswith("gfx9")


def missing() -> str | None:
    """Why Triton's kernels cannot be compiled here; None where they can."""
    from qkern.backends import triton

    return triton.missing_reason()


@contextlib.contextmanager
def compiling(arch: int | str) -> Iterator[list[Compiled]]:
    """In the block, launches compile for ``arch`` and do nothing else; gives what they compiled."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    original: Callable[..., Any] = JITFunction.run
    found: list[Compiled] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        arguments = dict(zip(self.arg_names, args, strict=False)) | options
        found.append(
            Compiled(
                self.__name__.removeprefix("_"),
                dict(kernel.asm),
                kernel.metadata.shared,
                kernel.metadata.num_warps,
                {name: arguments[name] for name in self.arg_names if name in arguments},
                frozenset(p.name for p in self.params if p.is_constexpr),
                tuple(grid),
            )
        )
        return kernel

    before = dict(vars(driver))
    JITFunction.run = run
    driver.set_active(_Driver(arch))
    try:
        kind = "cuda" if arch in NVIDIA else "hip"
        with backends.use(backend_for(kind, arch, _PROCESSORS)):
            yield found
    finally:
        JITFunction.run = original
        vars(driver).clear()
        vars(driver).update(before)


SIZE = 4096
"""Rows and columns of the weight in every call below: what matters of it is that 16 divides it."""


EXPERTS = 8
"""Weights of every call below that takes several."""


def _weight(double_quant: bool = True, experts: int = 1) -> Weight:
    blocks = SIZE * SIZE // 64
    groups = formats.num_blocks(blocks, formats.NESTED_BLOCK_SIZE)
    return Weight(
        packed=torch.empty(experts * SIZE * SIZE // 2, dtype=torch.uint8),
        absmax=torch.empty(experts * blocks, dtype=torch.uint8 if double_quant else torch.float32),
        nested_absmax=torch.empty(experts * groups) if double_quant else None,
        nested_offset=torch.empty(experts) if double_quant else None,
        codebook=None,
        format="nf4",
        block_size=64,
    )


ROWS = (1, 32, 64, 512)
"""Rows of x, or of each expert: one for each tile that ``launch`` has."""


RANKS = (16, 128)
"""Of adapters: one for each tile that products with them have."""


def calls(only: str = "") -> dict[str, Callable[[], object]]:
    """The calls whose launches are examined, by ``op-dtype-variant`` with ``only`` in it."""
    ops = torch.ops.qkern
    found: dict[str, Callable[[], object]] = {}
    weight = functools.cache(_weight)
    for name, dtype in DTYPES.items():
        flat = functools.partial(torch.empty, (SIZE * 16,), dtype=dtype)
        for format in ("nf4", "fp4"):
            found[f"quantize_4bit-{name}-{format}"] = functools.partial(
                lambda flat, format: ops.quantize_4bit(flat(), format, 64, None), flat, format
            )
        for dq in (True, False):
            found[f"dequantize_4bit-{name}-{'double_quant' if dq else 'plain'}"] = (
                functools.partial(
                    lambda dq, dtype: ops.dequantize_4bit(*weight(dq), (SIZE, SIZE), dtype),
                    *(dq, dtype),
                )
            )
        if name == "bf16":
            # Read in pieces; FP4 takes the most registers.
            found[f"quantize_4bit-{name}-fp4_long"] = functools.partial(
                lambda flat: ops.quantize_4bit(flat(), "fp4", formats.MAX_BLOCK_SIZE, None), flat
            )
            found[f"quantize_8bit-{name}-long"] = functools.partial(
                lambda flat, size: ops.quantize_8bit(flat(), formats.map_tensor("signed"), size),
                *(flat, formats.MAX_BLOCK_SIZE),
            )
        found[f"quantize_8bit-{name}"] = functools.partial(
            lambda flat: ops.quantize_8bit(flat(), formats.map_tensor("signed"), 256), flat
        )
        found[f"dequantize_8bit-{name}"] = functools.partial(_dequantize_8bit, dtype)
        for bits, seed in itertools.product((32, 8), (None, 1) if name == "bf16" else (None,)):
            variant = f"{bits}bit" + ("_stochastic" if seed else "")
            found[f"adamw_step-{name}-{variant}"] = functools.partial(
                _adamw_step, dtype, bits, seed
            )
        for op, rows in itertools.product(("linear_4bit", "linear_4bit_dx"), ROWS):
            found[f"{op}-{name}-{rows}"] = functools.partial(_matmul, op, rows, dtype, weight)
            grouped = functools.partial(_grouped_matmul, f"grouped_{op}", rows, dtype, weight)
            found[f"grouped_{op}-{name}-{rows}"] = grouped
            if rows == 1:
                # Sums in parts.
                found[f"grouped_{op}-{name}-invariant"] = functools.partial(grouped, True)
        for rank, own in itertools.product(RANKS, (False, True)):
            for into_rank in (False,) if own else (False, True):
                variant = f"{rank}" + ("_own" if own else "_into" if into_rank else "")
                found[f"grouped_matmul_into-{name}-{variant}"] = functools.partial(
                    _grouped_matmul_into, dtype, rank, own, into_rank
                )
    found["quantize_absmax-fp32"] = lambda: ops.quantize_absmax(torch.empty(SIZE))
    return {key: call for key, call in found.items() if only in key}


def _dequantize_8bit(dtype: torch.dtype) -> Tensor:
    codes, absmax = torch.empty(SIZE * 16, dtype=torch.uint8), torch.empty(SIZE * 16 // 256)
    map = formats.map_tensor("signed")
    return torch.ops.qkern.dequantize_8bit(codes, absmax, map, 256, dtype)


def _adamw_step(dtype: torch.dtype, bits: int, seed: int | None) -> None:
    state = functools.partial(
        torch.empty, SIZE * 16, dtype=torch.uint8 if bits == 8 else torch.float32
    )
    absmaxes = [torch.empty(formats.num_blocks(SIZE * 16, formats.STATE_BLOCK_SIZE))] * (bits == 8)
    param = torch.empty(SIZE * 16, dtype=dtype)
    factors = torch.empty(1, reference.ADAMW_FACTORS)
    tensors = ([param], [param], [state()], [state()], absmaxes, absmaxes)
    torch.ops.qkern.adamw_step(*tensors, factors, seed)


def _matmul(op: str, rows: int, dtype: torch.dtype, weight: Callable[[], Weight]) -> Tensor:
    matrix = torch.empty((rows, SIZE), dtype=dtype)
    bias = (torch.empty(SIZE, dtype=dtype),) if op == "linear_4bit" else ()
    return getattr(torch.ops.qkern, op)(matrix, *weight(), SIZE, *bias)


def _grouped_matmul(
    op: str,
    rows: int,
    dtype: torch.dtype,
    weight: Callable[..., Weight],
    batch_invariant: bool = False,
) -> Tensor:
    matrix = torch.empty((EXPERTS * rows, SIZE), dtype=dtype)
    offsets = torch.empty(EXPERTS, dtype=torch.int32)
    bias = (torch.empty((EXPERTS, SIZE), dtype=dtype),) if op == "grouped_linear_4bit" else ()
    stacked = weight(experts=EXPERTS)
    arguments = (matrix, *stacked, SIZE, offsets, *bias, batch_invariant)
    return getattr(torch.ops.qkern, op)(*arguments)


def _grouped_matmul_into(dtype: torch.dtype, rank: int, own: bool, into_rank: bool) -> None:
    """As an adapter's: activations by its factor ``A``, ``B`` added to a result, or a gradient."""
    rows = EXPERTS * 64
    offsets = torch.empty(EXPERTS, dtype=torch.int32)
    matrix, narrow = torch.empty((rows, SIZE), dtype=dtype), torch.empty((rows, rank))
    factor = torch.empty((EXPERTS, rank, SIZE))
    if own:
        arguments = (torch.empty_like(factor), narrow, matrix, offsets)
    elif into_rank:
        arguments = (narrow, matrix, factor.mT, offsets)
    else:
        arguments = (matrix, narrow, factor, offsets)
    torch.ops.qkern.grouped_matmul_into(*arguments, 0.5, not own and not into_rank)
