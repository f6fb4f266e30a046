"""Asks sentryward whether a kernel's PTX is free of races for one launch.

A branch that depends on where a tensor lies (its alignment), which sentryward does not know, is
decided both ways: each way must be proved.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.cuda import skeleton
from lab.cuda.static import figures, toolchain
from lab.ptx_prover import verify

Arguments = Mapping[str, str | int | None]
POINTER = ctypes.c_uint64
INT = ctypes.c_int32
LONG = ctypes.c_int64


class Scales(ctypes.Structure):
    _fields_ = (
        *(("absmax", POINTER), ("nested_absmax", POINTER), ("nested_offset", POINTER)),
        ("block_shift", INT),
    )


class CodeSource(ctypes.Structure):
    _fields_ = (("values", ctypes.c_float * 16), ("custom", POINTER))


class Region(ctypes.Structure):
    _fields_ = (("first", LONG), ("row_length", LONG), ("row_skip", LONG))


class BlockPlan(ctypes.Structure):
    _fields_ = (
        *(("numel", LONG), ("units", LONG)),
        *(("block_shift", INT), ("passes", INT), ("block_lanes", INT)),
    )


class Epilogue(ctypes.Structure):
    _fields_ = (("bias", POINTER),)


class MmaOutput(ctypes.Structure):
    _fields_ = (
        *(("bias", POINTER), ("y", POINTER), ("parts", POINTER)),
        *(("m", LONG), ("columns", LONG)),
    )


class MmaArgs(ctypes.Structure):
    """Of linear_4bit_mma_kernel, and DxArgs of linear_4bit_dx_mma_kernel."""

    _fields_ = (
        *(("x", POINTER), ("m", LONG), ("x_row_stride", LONG), ("packed", POINTER)),
        *(("scales", Scales), ("source", CodeSource), ("rows", LONG), ("cols", LONG)),
        *(("split_length", LONG), ("output", MmaOutput)),
    )


class VectorArgs(ctypes.Structure):
    _fields_ = (
        *(("x", POINTER), ("m", LONG), ("x_row_stride", LONG), ("packed", POINTER)),
        *(("scales", Scales), ("source", CodeSource), ("rows", LONG), ("cols", LONG)),
        *(("split_length", LONG), ("bias", POINTER), ("y", POINTER), ("parts", POINTER)),
    )


class TiledArgs(ctypes.Structure):
    _fields_ = (
        *(("x", POINTER), ("m", LONG), ("x_row_stride", LONG), ("packed", POINTER)),
        *(("scales", Scales), ("source", CodeSource), ("rows", LONG), ("cols", LONG)),
        *(("bias", POINTER), ("y", POINTER)),
    )


class Piece(ctypes.Structure):
    _fields_ = (
        *(("param", POINTER), ("grad", POINTER), ("exp_avg", POINTER), ("exp_avg_sq", POINTER)),
        *(("exp_avg_absmax", POINTER), ("exp_avg_sq_absmax", POINTER), ("factors", POINTER)),
        *(("numel", LONG), ("first_chunk", LONG), ("first_block", LONG), ("index", INT)),
    )


class Pieces(ctypes.Structure):
    """With ``QKERN_CODEC_SELECT``."""

    _fields_ = (
        *(("chunks", LONG), ("seed", LONG), ("count", INT), ("stochastic_rounding", INT)),
        ("piece", Piece * 2),
    )


@dataclass(frozen=True)
class Proof:
    """A kernel, a launch, and its arguments by ``parameter`` or ``parameter.field.field``.

    A string is a tensor of that name, None the null pointer.
    """

    kernel: str
    source: str
    grid: tuple[int, int, int]
    threads: int
    parameters: tuple[type, ...]
    arguments: Arguments
    shared: str | None = None
    """C++ type whose size is the dynamic shared memory."""
    select: bool = False
    """Whether it is asked about the select form of the tables (``QKERN_CODEC_SELECT``).

    In a shared object of its own a table may be indexed by data: the skeleton reads all of it. In
    one that also holds what threads write, such reads would seem to race.
    """
    case: str = ""
    """What tells it from another launch of the same kernel."""
    timeout_s: int = 240

    def __str__(self) -> str:
        return f"{self.kernel}-{self.case}" if self.case else self.kernel


@dataclass(frozen=True)
class Verdict:
    """What sentryward answered: ``race_free``, or the first other result."""

    result: str
    asked: int
    """How many times it was asked."""
    message: str = ""
    misaligned: tuple[str, ...] = ()
    """Tensors that were not 16-aligned then."""


def _parts(type_: type) -> Iterator[tuple[str, int, type]]:
    """Name, offset and type of a structure's fields, or of an array's elements."""
    if issubclass(type_, ctypes.Structure):
        for name, field in type_._fields_:  # type: ignore[misc]
            yield name, getattr(type_, name).offset, field
    elif issubclass(type_, ctypes.Array):
        for i in range(type_._length_):
            yield str(i), i * ctypes.sizeof(type_._type_), type_._type_


def _offset(type_: type, path: list[str]) -> tuple[int, type]:
    offset = 0
    for name in path:
        ((at, type_),) = ((at, part) for found, at, part in _parts(type_) if found == name)
        offset += at
    return offset, type_


_SCALARS = {LONG: "u64", INT: "u32", POINTER: "u64"}


def _input(proof: Proof, entry: str, shared_bytes: int) -> dict[str, object]:
    declarations, arguments = [], []
    for path, value in proof.arguments.items():
        index, *fields = path.split(".")
        offset, type_ = _offset(proof.parameters[int(index)], fields)
        place: dict[str, object] = {"parameter": int(index)}
        if fields:
            place["offset"] = offset
        if isinstance(value, str):
            kind = {"type": "pointer", "space": "global", "object": value}
            declarations.append(place | kind)
        else:
            arguments.append(place | {"type": _SCALARS[type_], "value": value or 0})
    # The map of double quantisation, which the PTX text takes as one more parameter.
    map_ = {"type": "pointer", "space": "global", "object": "dynamic_map"}
    declarations.append({"parameter": len(proof.parameters)} | map_)
    launch: dict[str, object] = {"grid_dim": list(proof.grid), "block_dim": [proof.threads, 1, 1]}
    if shared_bytes:
        launch["dynamic_shared_bytes"] = shared_bytes
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": launch,
        "declarations": declarations,
        "arguments": arguments,
    }


def pointers(proof: Proof) -> dict[tuple[int, int], str]:
    """All pointers among the parameters, and the map that is the last one, for the skeleton."""
    found = {(len(proof.parameters), 0): "dynamic_map"}

    def walk(type_: type, index: int, offset: int, name: str) -> None:
        if type_ is POINTER:
            value = proof.arguments.get(name)
            found[index, offset] = value if isinstance(value, str) else skeleton.NULL
        for part, at, part_type in _parts(type_):
            walk(part_type, index, offset + at, f"{name}.{part}")

    for index, type_ in enumerate(proof.parameters):
        walk(type_, index, 0, str(index))
    return found


def kernel_text(
    proof: Proof, architecture: int, kernels: Path = toolchain.KERNELS
) -> tuple[str, str]:
    """The PTX of the one kernel, and its entry's name.

    sentryward does not know arrays in device memory that are not parameters: the tables of 8-bit
    codes become the last parameter, which the kernel reads where it read the array.
    """
    source = kernels / proof.source
    defines = ("QKERN_CODEC_SELECT",) if proof.select else ()
    path = toolchain.compile_kernels(source, architecture, "ptx", defines=defines)
    text = path.read_text()
    parts = re.split(r"(?m)^(?=(?:\.visible )?(?:\.weak )?\.entry )", text)
    entries = [re.search(r"\.entry\s+(\w+)", part) for part in parts[1:]]
    names = [found[1] for found in entries if found]
    short = figures.demangle(names)
    index = short.index(proof.kernel)
    entry, body = names[index], parts[1 + index]
    # What follows the kernel's closing brace belongs to the file.
    body = body[: body.index("\n}") + 3]
    head, _, rest = body.partition(")")
    sizes = [int(size) for size in re.findall(r"\.b8 \w+\[(\d+)\]", head)]
    structures = [p for p in proof.parameters if issubclass(p, ctypes.Structure)]
    assert sizes == [ctypes.sizeof(p) for p in structures], f"{proof.kernel}: {sizes}"
    body = f"{head.rstrip()},\n\t.param .u64 {entry}_param_{len(proof.parameters)}\n){rest}"
    body = re.sub(
        r"mov\.u64\s+(%rd\d+), \w*kDevice(?:MapSigned|MomentTables)\w*;",
        rf"ld.param.u64 \1, [{entry}_param_{len(proof.parameters)}];\n\tcvta.to.global.u64 \1, \1;",
        body,
    )
    assert "kDevice" not in body
    return parts[0] + body, entry


def ask(proof: Proof, text: str, entry: str, shared_bytes: int) -> tuple[str, str]:
    """Sentryward's result for PTX, and what it says of it."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, question = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        ptx.write_text(text)
        question.write_text(json.dumps(_input(proof, entry, shared_bytes)))
        answer = verify(ptx, question, proof.timeout_s, memory_limit_mib=6000)
    first = (answer.get("diagnostics") or [{}])[0]
    where = first.get("details", {}).get("location", {}).get("line")
    line = "" if where is None else f" ({text.splitlines()[where - 1].strip()})"
    return answer["result"], f"{first.get('code')}: {first.get('message')}{line}"


def prove(proof: Proof, architecture: int, kernels: Path = toolchain.KERNELS) -> Verdict:
    """Sentryward's answer about the skeleton of a kernel in ``kernels``.

    ``race_free`` only if it is whichever of the tensors are not 16-aligned, as far as the kernel
    looks at that.
    """
    text, entry = kernel_text(proof, architecture, kernels)
    shared = 0
    if proof.shared is not None:
        shared = figures.struct_sizes(kernels / proof.source, [proof.shared])[proof.shared]
    objects = pointers(proof)
    try:
        tests = skeleton.tested_for_alignment(text, objects)
        names = sorted(set().union(*tests))
        tried: set[tuple[bool, ...]] = set()
        for count in range(len(names) + 1):
            for misaligned in itertools.combinations(names, count):
                answers = tuple(not test.isdisjoint(misaligned) for test in tests)
                if answers in tried:
                    continue
                tried.add(answers)
                reduced = skeleton.skeleton(text, objects, misaligned)
                result, message = ask(proof, reduced, entry, shared)
                if result != "race_free":
                    return Verdict(result, len(tried), message, misaligned)
    except skeleton.SkeletonError as error:
        return Verdict("no skeleton", 0, str(error))
    return Verdict("race_free", len(tried))


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
            (1, 1, 1),
            256,
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
            (1, 1, 1),
            256,
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
            (1, 1, 1),
            256,
            parameters,
            {"0": "x", **_block_plan(8), "2": "map", "3": "codes", "4": "absmax"},
        )
        yield Proof(
            f"dequantize_8bit_kernel<{t}>",
            "quantize_8bit.cu",
            (1, 1, 1),
            256,
            (POINTER, POINTER, POINTER, INT, LONG, POINTER),
            {"0": "codes", "1": "absmax", "2": "map", "3": 8, "4": 2043, "5": "out"},
        )
    yield Proof(
        "absmax_mean_kernel",
        "quantize_absmax.cu",
        (1, 1, 1),
        1024,
        (POINTER, LONG, POINTER),
        {"0": "absmax", "1": 4099, "2": "nested_offset"},
    )
    yield Proof(
        "quantize_absmax_kernel",
        "quantize_absmax.cu",
        (1, 1, 1),
        256,
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
            # So long a row of W that x is staged twice.
            m, n, k = rows, 4 * warp_rows - 1, 8224 // rows if whole else 1050
            k = k - k % 32 if whole else k
            yield Proof(
                f"linear_4bit_vector_kernel<{t}, {rows}, {warp_rows}, {str(whole).lower()}>",
                "linear_4bit_vector.cu",
                (1, 1, 2 if split else 1),
                128,
                (VectorArgs,),
                {
                    **_matmul(m, n, k, nested=whole),
                    "0.split_length": 1024 if split else k,
                    "0.x_row_stride": k,
                    "0.bias": "bias",
                    "0.y": None if split else "y",
                    "0.parts": "parts" if split else None,
                },
                f"VectorShared<{t}, {rows}>",
                select=True,
            )


def _tiled() -> Iterator[Proof]:
    for t in TYPES:
        for input_gradient in (False, True):
            yield Proof(
                f"linear_4bit_tiled_kernel<{t}, {str(input_gradient).lower()}>",
                "linear_4bit_tiled.cu",
                (1, 1, 1),
                256,
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
        for tile, stages in ((16, 4), (64, 2)):
            split = t == "Float16"
            m, rows, cols = tile - 3, 120, 128 * (2 * stages + 1) + 32
            yield Proof(
                f"linear_4bit_mma_kernel<{t}, {tile}, {stages}>",
                "linear_4bit_mma.cu",
                (1, 1, 2 if split else 1),
                128,
                (MmaArgs,),
                {
                    **_matmul(m, rows, cols, nested=split),
                    "0.split_length": 128 * (stages + 1) if split else cols,
                    "0.x_row_stride": cols,
                    **_mma_output(m, rows, True, split),
                },
                f"MmaShared<{tile}, {stages}>",
                select=True,
            )
        m, rows, cols = 61, 64 * 6 + 8, 96
        yield Proof(
            f"linear_4bit_dx_mma_kernel<{t}, 64, 3>",
            "linear_4bit_dx_mma.cu",
            (1, 1, 2 if split else 1),
            128,
            (MmaArgs,),
            {
                **_matmul(m, rows, cols, nested=split),
                "0.split_length": 64 * 4 if split else rows,
                "0.x_row_stride": rows,
                **_mma_output(m, cols, False, split),
            },
            "DxShared<64, 3>",
            select=True,
        )
    for t in TYPES:
        yield Proof(
            f"sum_splits_kernel<{t}>",
            "linear_4bit.cu",
            (2, 1, 1),
            256,
            (POINTER, INT, LONG, LONG, Epilogue, POINTER),
            {"0": "parts", "1": 3, "2": 4, "3": 127, "4.bias": "bias", "5": "y"},
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
            (1, 1, 1),
            128,
            (Pieces,),
            arguments,
            select=True,
        )


PROOFS = (
    *_adamw_step(),
    *_dequantize_4bit(),
    *_quantizers(),
    *_vector(),
    *_tiled(),
    *_tensor_cores(),
)
"""Every kernel that is compiled for sm_80 and later."""


def compiled_kernels(architecture: int) -> set[str]:
    """Names of the kernels in csrc/cuda, each with its template arguments."""
    names = set()
    for source in sorted(toolchain.KERNELS.glob("*.cu")):
        text = toolchain.compile_kernels(source, architecture, "ptx").read_text()
        found = re.findall(r"(?m)^(?:\.visible )?(?:\.weak )?\.entry\s+(\w+)", text)
        names.update(figures.demangle(found) if found else ())
    return names


def main() -> None:
    """``lab.cuda.proofs ARCHITECTURE [PART OF A NAME ...]`` prints what sentryward answers."""
    architecture, *parts = sys.argv[1:]
    for proof in PROOFS:
        if not parts or any(part in str(proof) for part in parts):
            start = time.monotonic()
            verdict = prove(proof, int(architecture))
            seconds = time.monotonic() - start
            print(f"sm_{architecture} {proof}: {verdict} {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
