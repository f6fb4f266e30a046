"""One small launch of each CUDA kernel, to be proved free of races."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .experts import by_experts, into
from .structures import (
    INT,
    LONG,
    POINTER,
    BlockPlan,
    CodeSource,
    Epilogue,
    MmaArgs,
    Pieces,
    Region,
    Scales,
    TiledArgs,
    VectorArgs,
)

Arguments = Mapping[str, str | int | None]


@dataclass(frozen=True)
class Proof:
    """A kernel, a launch, and its arguments by ``parameter`` or ``parameter.field.field``.

    A string is a tensor of that name, None the null pointer.
    """

    kernel: str
    source: str
    parameters: tuple[type, ...]
    arguments: Arguments
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 256
    shared: str | None = None
    """C++ type whose size is the dynamic shared memory."""
    select: bool = False
    """Whether it is asked about the select form of the tables (``QKERN_CODEC_SELECT``).

    In a shared object of its own a table may be indexed by data: the skeleton reads all of it. In
    one that also holds what threads write, such reads would seem to race.
    """
    case: str = ""
    """What tells it from another launch of the same kernel."""
    timeout_s: int = 1200
    """Of the prover: minutes at most on a quiet machine, several times that on a loaded one."""
    architectures: tuple[int, ...] = (80, 90, 100)
    """For which it is proved."""

    def __str__(self) -> str:
        return f"{self.kernel}-{self.case}" if self.case else self.kernel


TYPES = ("float", "BFloat16", "Float16")

HALVES = TYPES[1:]


def _scales(prefix: str, nested: bool, block_shift: int = 6) -> Arguments:
    return {
        f"{prefix}.absmax": "absmax",
        f"{prefix}.nested_absmax": "nested_absmax" if nested else None,
        f"{prefix}.nested_offset": "nested_offset" if nested else None,
        f"{prefix}.block_shift": block_shift,
    }


def _block_plan(block_shift: int) -> Arguments:
    """Two warps' elements and a few of a third's, of which a thread takes 8."""
    return {
        "1.numel": 603,
        "1.units": 3,
        "1.block_shift": block_shift,
        "1.passes": 1,
        "1.block_lanes": (1 << block_shift) // 8,
    }


def _matmul(m: int, rows: int, cols: int, nested: bool, custom: bool = False) -> Arguments:
    return {
        "0.x": "x",
        "0.m": m,
        "0.packed": "packed",
        "0.rows": rows,
        "0.cols": cols,
        "0.source.custom": "codebook" if custom else None,
        **_scales("0.scales", nested, 5),
    }


def _part(length: int) -> Arguments:
    """Of a contraction, summed by a block that has no shares of it."""
    return {"0.split_length": length, "0.share_length": length}


def _mma_output(m: int, columns: int, bias: bool, split: bool) -> Arguments:
    return {
        "0.output.bias": "bias" if bias else None,
        "0.output.y": None if split else "y",
        "0.output.parts": "parts" if split else None,
        "0.output.m": m,
        "0.output.columns": columns,
    }


def _dequantize_4bit() -> Iterator[Proof]:
    parameters = (POINTER, Scales, CodeSource, Region, LONG, POINTER)
    for t, nested, custom in (
        *((t, False, False) for t in TYPES),
        ("BFloat16", True, False),
        ("float", True, True),
    ):
        # Two rounds of the block's 8192 codes, a warp's, and a few of another's.
        numel = 2 * 8192 + 1024 + 37
        yield Proof(
            f"dequantize_4bit_kernel<{t}>",
            "dequantize_4bit.cu",
            parameters,
            {
                "0": "packed",
                **_scales("1", nested),
                "2.custom": "codebook" if custom else None,
                "3.first": 0,
                "3.row_length": numel,
                "3.row_skip": 0,
                "4": numel,
                "5": "out",
            },
            select=True,
            case=("nested" if nested else "") + ("-custom" if custom else ""),
        )


def _quantizers() -> Iterator[Proof]:
    parameters = (POINTER, BlockPlan, CodeSource, POINTER, POINTER)
    for t, fp4, custom in (
        *((t, fp4, False) for t in TYPES for fp4 in (False, True)),
        ("float", False, True),
    ):
        yield Proof(
            f"quantize_4bit_kernel<{t}, {str(fp4).lower()}>",
            "quantize_4bit.cu",
            parameters,
            {
                "0": "x",
                **_block_plan(6),
                "2.custom": "codebook" if custom else None,
                "3": "packed",
                "4": "absmax",
            },
            case="custom" if custom else "",
        )
    parameters = (POINTER, BlockPlan, POINTER, POINTER, POINTER)
    for t in TYPES:
        yield Proof(
            f"quantize_8bit_kernel<{t}>",
            "quantize_8bit.cu",
            parameters,
            {"0": "x", **_block_plan(8), "2": "map", "3": "codes", "4": "absmax"},
        )
        yield Proof(
            f"dequantize_8bit_kernel<{t}>",
            "quantize_8bit.cu",
            (POINTER, POINTER, POINTER, INT, LONG, POINTER),
            {"0": "codes", "1": "absmax", "2": "map", "3": 8, "4": 2043, "5": "out"},
        )
    yield Proof(
        "absmax_mean_kernel",
        "quantize_absmax.cu",
        (POINTER, LONG, POINTER),
        {"0": "absmax", "1": 4099, "2": "nested_offset"},
        threads=1024,
    )
    yield Proof(
        "quantize_absmax_kernel",
        "quantize_absmax.cu",
        parameters,
        {
            "0": "absmax",
            **_block_plan(8),
            "2": "nested_offset",
            "3": "codes",
            "4": "nested_absmax",
        },
    )


def _vector() -> Iterator[Proof]:
    for t in TYPES:
        for rows, warp_rows, whole, split in (
            *((1, 4, True, False), (2, 4, True, False), (4, 4, True, True)),
            *((8, 2, True, False), (4, 4, False, False)),
        ):
            # Two groups; so long a row of W that x is staged twice in a share, and that there is
            # one share more than groups.
            tiles = max(4 // rows, 1) + 1
            m, n, share = rows, 4 * warp_rows - 1, 1024 * tiles
            k = 2 * share + 96 if whole else 2 * share + 26
            yield Proof(
                f"linear_4bit_vector_kernel<{t}, {rows}, {warp_rows}, {str(whole).lower()}>",
                "linear_4bit_vector.cu",
                (VectorArgs,),
                {
                    **_matmul(m, n, k, nested=whole),
                    "0.split_length": 2 * share if split else k,
                    "0.share_length": share,
                    "0.shares": 2 if split else 3,
                    "0.x_row_stride": k,
                    "0.bias": "bias",
                    "0.y": None if split else "y",
                    "0.parts": "parts" if split else None,
                },
                shared=f"VectorShared<{t}, {rows}>",
                select=True,
                grid=(1, 1, 2 if split else 1),
                threads=128 if t == "float" and rows == 8 else 256,
            )


def _tiled() -> Iterator[Proof]:
    for t in TYPES:
        for input_gradient in (False, True):
            yield Proof(
                f"linear_4bit_tiled_kernel<{t}, {str(input_gradient).lower()}>",
                "linear_4bit_tiled.cu",
                (TiledArgs,),
                {
                    **_matmul(63, 61, 67, nested=False),
                    "0.x_row_stride": 67,
                    "0.bias": "bias",
                    "0.y": "y",
                },
                select=True,
            )


def _tensor_cores() -> Iterator[Proof]:
    for t in HALVES:
        for tile, stages in ((16, 3), (32, 2), (64, 2)):
            split = t == "Float16"
            # Of a block with shares: two of its groups have more tiles than stages, one has few.
            groups = 4 if tile == 16 else 1
            tiles = 2 * stages + 1
            m, rows = tile - 3, 56 if groups > 1 else 120
            share = 128 * (stages + 1)
            cols = 128 * tiles + 32 if groups == 1 else 2 * share + 160
            yield Proof(
                f"linear_4bit_mma_kernel<{t}, {tile}, {stages}>",
                "linear_4bit_mma.cu",
                (MmaArgs,),
                {
                    **_matmul(m, rows, cols, nested=split),
                    "0.split_length": share if split else cols,
                    "0.share_length": 128 if split else share,
                    "0.x_row_stride": cols,
                    **_mma_output(m, rows, True, split),
                },
                shared=f"MmaShared<{tile}, {stages}>",
                select=True,
                grid=(1, 1, 2 if split else 1),
                threads=256 if groups > 1 else 128,
            )
        for tile in (64, 128):
            m, rows, cols = tile - 3, 32 * 5 + 8, 96
            split = t == "Float16"
            yield Proof(
                f"linear_4bit_dx_mma_kernel<{t}, {tile}, 3>",
                "linear_4bit_dx_mma.cu",
                (MmaArgs,),
                {
                    **_matmul(m, rows, cols, nested=split),
                    **_part(32 * 4 if split else rows),
                    "0.x_row_stride": rows,
                    **_mma_output(m, cols, False, split),
                },
                shared=f"DxShared<{tile}, 3>",
                select=True,
                grid=(1, 1, 2 if split else 1),
                threads=128,
            )
    for t in TYPES:
        yield Proof(
            f"sum_splits_kernel<{t}>",
            "linear_4bit.cu",
            (POINTER, INT, LONG, LONG, Epilogue, POINTER),
            {"0": "parts", "1": 3, "2": 4, "3": 127, "4.bias": "bias", "5": "y"},
            grid=(2, 1, 1),
        )


def _hopper() -> Iterator[Proof]:
    """Of a tile that is copied, or decoded, in place of another: more tiles than places.

    What products read of shared memory is in the skeleton where they start; how long they read it,
    the emulator knows.
    """
    for t in HALVES:
        split = t == "Float16"
        for tile, halves in itertools.product((128, 256), (False, True)):
            stages = 6 if tile == 128 else 5
            m, rows = tile - 3, 120
            share = 64 * (stages + 1)
            cols = share + (96 if halves else 64)
            yield Proof(
                f"linear_4bit_wgmma_kernel<{t}, {tile}, {str(halves).lower()}>",
                "linear_4bit_wgmma.cu",
                (MmaArgs,),
                {
                    **_matmul(m, rows, cols, nested=split),
                    **_part(share if split else cols),
                    "0.x_row_stride": cols,
                    **_mma_output(m, rows, True, split),
                },
                shared=f"WgmmaShared<{tile}>",
                select=True,
                grid=(1, 1, 2 if split else 1),
                architectures=(90,),
            )
        m, rows, cols, share = 125, 64 * 5 + 8, 224, 64 * 4
        yield Proof(
            f"linear_4bit_dx_wgmma_kernel<{t}>",
            "linear_4bit_dx_wgmma.cu",
            (MmaArgs,),
            {
                **_matmul(m, rows, cols, nested=split),
                **_part(share if split else rows),
                "0.x_row_stride": rows,
                **_mma_output(m, cols, False, split),
            },
            shared="DxWgmmaShared",
            select=True,
            grid=(1, 1, 2 if split else 1),
            architectures=(90,),
        )


def _adamw_step() -> Iterator[Proof]:
    # Two rounds of the block's four warps and a bit more, and of a second parameter.
    numels = 2 * 1024 + 37, 5
    chunks = [-(-numel // 1024) for numel in numels]
    for t, state in itertools.product(TYPES, ("float", "unsigned char")):
        arguments: dict[str, str | int | None] = {
            "0.chunks": sum(chunks),
            "0.seed": 1,
            "0.count": 2,
            "0.stochastic_rounding": 1,
        }
        for i, numel in enumerate(numels):
            piece = f"0.piece.{i}"
            names = ["param", "grad", "exp_avg", "exp_avg_sq", "factors"]
            if state != "float":
                names += ["exp_avg_absmax", "exp_avg_sq_absmax"]
            arguments |= {f"{piece}.{name}": f"{name}_{i}" for name in names}
            arguments |= {
                f"{piece}.numel": numel,
                f"{piece}.first_chunk": sum(chunks[:i]),
                f"{piece}.first_block": 0,
                f"{piece}.index": i,
            }
        yield Proof(
            f"adamw_step_kernel<{t}, {state}>",
            "adamw_step.cu",
            (Pieces,),
            arguments,
            select=True,
            threads=128,
        )


PROOFS = (
    *_adamw_step(),
    *_dequantize_4bit(),
    *_quantizers(),
    *_vector(),
    *_tiled(),
    *_tensor_cores(),
    *_hopper(),
    *by_experts((*_vector(), *_tiled(), *_tensor_cores())),
    *(Proof(**fields) for fields in into()),
)
"""Every kernel that is compiled for sm_80 and later, or for sm_90a."""
