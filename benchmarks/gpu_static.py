#!/usr/bin/env python3
"""The CUDA and Triton kernels beside bitsandbytes', by their machine code; no GPU is used.

Prints for each architecture registers, occupancy, spills and what a round of the hot loop costs,
and a modelled time for GPUs of these architectures: the longest of moving the bytes, issuing the
instructions, those of integers and bytes among them, accesses to shared memory and multiplying on
tensor cores, at the datasheet's rates and perfectly overlapped; of Hopper's own products also of
what comes from the L2 cache. A model is no measurement: a kernel takes longer, and this says by
what it is limited at best.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from lab.cuda.static import budget, figures, sass, toolchain
from lab.triton.static import compile as triton_compiler
from lab.triton.static import figures as triton_figures

QKERN, HOPPER, TRITON, PEER = "qkern", "qkern wgmma", "qkern triton", "bitsandbytes"
COLOURS = {QKERN: "tab:blue", HOPPER: "tab:cyan", TRITON: "tab:green", PEER: "tab:red"}
STEP_BYTES = {
    "adamw": budget.step_bytes("BFloat16", "float"),
    "adamw 8 bits": budget.step_bytes("BFloat16", "unsigned char"),
}
"""Of a parameter in 16 bits, by the moments' width."""
BYTES_A_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""NF4, block 64, double-quantised."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Datasheet figures."""

    name: str
    architecture: int
    processors: int
    boost_ghz: float
    gbytes_s: float
    tensor_tflops: float
    """16-bit inputs, float32 sums, dense."""
    mma_share: float = 1.0
    """Of it, what ``mma.sync`` reaches, which all kernels here but Triton's and those for Hopper
    use: an assumption."""

    @property
    def issue_rate(self) -> float:
        """Warp instructions a second: four a cycle on each multiprocessor."""
        return 4 * self.processors * self.boost_ghz * 1e9

    @property
    def alu_rate(self) -> float:
        """Warp instructions a second of integers, bytes and comparisons."""
        return self.issue_rate / 2

    @property
    def wavefront_rate(self) -> float:
        """Passes over the banks of shared memory a second: one a cycle and multiprocessor."""
        return self.processors * self.boost_ghz * 1e9


GPUS = (
    Gpu("T4", 75, 40, 1.59, 320, 65),
    Gpu("A100 80GB SXM", 80, 108, 1.41, 2039, 312),
    Gpu("RTX 3090", 86, 82, 1.695, 936, 71),
    Gpu("RTX 4090", 89, 128, 2.52, 1008, 165.2),
    Gpu("H100 SXM", 90, 132, 1.83, 3350, 989, 0.63),
    Gpu("H200 SXM", 90, 132, 1.83, 4800, 989, 0.63),
)
ARCHITECTURES = tuple(dict.fromkeys(gpu.architecture for gpu in GPUS))


@dataclass(frozen=True, slots=True)
class Entry:
    """A kernel of one library for one architecture."""

    library: str
    op: str
    kernel: str
    architecture: int
    registers: int
    local_accesses: int
    loop_instructions: int
    instructions_a_weight: float | None
    instructions_a_kilo_multiply_add: float | None
    cycles_a_kilo_multiply_add: float | None
    wavefronts_a_weight: float | None
    wavefronts_a_kilo_multiply_add: float | None
    """Of shared memory, as many as a warp's lanes take for a weight each, and for products."""
    alu_a_weight: float | None
    alu_a_kilo_multiply_add: float | None
    """Instructions of integers, bytes and comparisons, of which half as many are taken."""
    tile_rows: int
    """Of x, that a block of a tensor-core kernel takes."""
    tile_columns: int
    """Of the result, if what a block reads is modelled too."""
    loop_accesses: dict[str, int]
    conflicting_shared_accesses: int | None
    occupancy: float | None


OURS = {
    "dequantize": ("dequantize_4bit_kernel<{}>",),
    "forward M=1": ("linear_4bit_vector_kernel<{}, 1, 4, true>",),
    "forward": (
        *("linear_4bit_mma_kernel<{}, 16, 3>", "linear_4bit_mma_kernel<{}, 32, 2>"),
        "linear_4bit_mma_kernel<{}, 64, 2>",
    ),
    "dx": ("linear_4bit_dx_mma_kernel<{}, 64, 3>", "linear_4bit_dx_mma_kernel<{}, 128, 3>"),
    "adamw": ("adamw_step_kernel<{}, float>",),
    "adamw 8 bits": ("adamw_step_kernel<{}, unsigned char>",),
}
"""Kernels by op; their type is bfloat16, and float16 on sm_75."""
OURS_FOR_HOPPER = {
    "forward": (
        *("linear_4bit_wgmma_kernel<{}, 128, false>", "linear_4bit_wgmma_kernel<{}, 256, false>"),
    ),
    "dx": ("linear_4bit_dx_wgmma_kernel<{}>",),
}
"""Those of sm_90a, which are launched only where they are asked for."""
TILE_COLUMNS = {"forward": 128, "dx": 256}
"""Of these."""
L2_BYTES = 28
"""That a multiprocessor gets from the cache a cycle: an assumption, where 5120 for all of them
(A100's whitepaper) would be 39."""
NOT_ON_75 = (", 16, 3>", ", 64, 2>", ", 128, 3>")
"""Ends of the names of those that are not launched there: two blocks of a tile do not fit."""
SOURCES = (
    *("dequantize_4bit.cu", "linear_4bit_vector.cu"),
    *("linear_4bit_mma.cu", "linear_4bit_dx_mma.cu", "adamw_step.cu"),
    *("linear_4bit_wgmma.cu", "linear_4bit_dx_wgmma.cu"),
)


def our_entries(architecture: int) -> list[Entry]:
    found = figures.kernel_figures(architecture)
    conflicts: dict[str, int] = {}
    for source in (path for path in toolchain.sources(architecture) if path.name in SOURCES):
        cubin = toolchain.compile_kernels(source, architecture)
        for kernel, seen in figures.shared_accesses(cubin).items():
            conflicts[kernel] = seen["conflicting"]
    kind = "BFloat16" if architecture >= 80 else "Float16"
    kernels = [(QKERN, op, kernel) for op, names in OURS.items() for kernel in names]
    if architecture == 90:
        kernels += [(HOPPER, op, name) for op, names in OURS_FOR_HOPPER.items() for name in names]
    return [
        _our_entry(library, op, found[kernel.format(kind)], conflicts)
        for library, op, kernel in kernels
        if architecture >= 80 or not kernel.endswith(NOT_ON_75)
    ]


def _our_entry(library: str, op: str, f: figures.Figures, conflicts: dict[str, int]) -> Entry:
    hot = f.hot
    if hot is None:
        raise ValueError(f"{f.kernel}: no hot loop found")
    macs, weights = hot.multiply_adds, hot.weights
    return Entry(
        *(library, op, f.kernel, f.architecture, f.registers, f.local_accesses),
        hot.instructions,
        hot.instructions_a_weight,
        1000 * hot.instructions / macs if macs else None,
        hot.cycles_a_kilo_multiply_add,
        hot.shared_wavefronts / weights if weights else None,
        1000 * hot.shared_wavefronts / macs if macs else None,
        hot.alu / weights if weights else None,
        1000 * hot.alu / macs if macs else None,
        figures.tile_rows(f.kernel) if macs else 0,
        TILE_COLUMNS[op] if library == HOPPER else 0,
        hot.accesses,
        conflicts[f.kernel],
        f.occupancy,
    )


TRITON_CALLS = {
    "dequantize": "dequantize_4bit-{}-double_quant",
    "forward M=1": "linear_4bit-{}-1",
    "forward": "linear_4bit-{}-64",
    "dx": "linear_4bit_dx-{}-64",
}
"""Call of `triton_compiler` by op; the matmuls' tiles have 16 rows and 64, as modelled."""
_PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")
"""What a matmul's hot loop has, the better first."""


def triton_entries(architecture: int) -> list[Entry]:
    """The Triton kernels for the same ops; none where Triton is not installed."""
    if triton_compiler.missing():
        return []
    calls = triton_compiler.calls()
    entries = []
    with triton_compiler.compiling(architecture) as launched:
        for op, name in TRITON_CALLS.items():
            call = name.format("bf16" if architecture >= 80 else "fp16")
            calls[call]()
            entries.append(_triton_entry(op, call, launched[0], architecture))
            launched.clear()
    return entries


def _triton_entry(
    op: str, call: str, compiled: triton_compiler.Compiled, architecture: int
) -> Entry:
    f = triton_figures.of(call, compiled, architecture)
    function = triton_figures.machine_code(compiled)
    threads = 32 * compiled.num_warps
    blocks = {name[-1]: n for name, n in compiled.arguments.items() if name.startswith("BLOCK_")}
    if op == "dequantize":
        # No loop: each thread runs the whole kernel once.
        path = sass.Path(tuple(function.instructions))
        weights, macs = 32 * compiled.arguments["UNITS"] / threads, 0
    else:
        product = next(base for base in _PRODUCTS if function.count(base))
        found = function.hot_path(product)
        if found is None:
            raise ValueError(f"{call}: no hot loop found")
        path = found
        weights = blocks["N"] * blocks["K"] / threads
        macs = 0 if op == "forward M=1" else weights * 32 * blocks["M"]
    count = len(path.instructions)
    known = architecture in sass.STALLS_KNOWN
    occupancy = figures.resident_warps(architecture, threads, f.registers, f.shared_bytes)
    return Entry(
        *(TRITON, op, f.kernel, architecture, f.registers, f.spills, count),
        None if macs else count / weights,
        1000 * count / macs if macs else None,
        1000 * path.cycles / macs if macs and known else None,
        None if macs else path.shared_wavefronts / weights,
        1000 * path.shared_wavefronts / macs if macs else None,
        None if macs else path.alu / weights,
        1000 * path.alu / macs if macs else None,
        blocks.get("M", 0),
        0,
        dict(sorted(path.widths.items())),
        None,
        occupancy / figures.PROCESSORS[architecture].warps,
    )


def _peer_weights(op: str, path: sass.Path) -> int:
    """Weights that a thread of the peer's kernel decodes in a round, or parameters it updates."""
    if op == "adamw 8 bits":
        return 1
    if op == "adamw":
        return 4
    if op == "dequantize":
        return 2 * path.count("LDG", 8)  # a byte at a time
    # 32 codes a 128-bit load; one load is of codes, the others of 32 values of x.
    return 32


def peer_entries(architecture: int) -> list[Entry]:
    """The peer's kernels for the same ops; it has none for the input gradient."""
    functions = budget.peer_functions(architecture)
    if not functions:
        return []
    half = "__nv_bfloat16" if architecture >= 80 else "__half"
    candidates = {
        "dequantize": [f"kDequantizeBlockwise<{half}, 512, 64, 8, 2>"],
        "forward M=1": [f"gemm_4bit_simt<{half}, 1>"],
        "forward": [n for n in functions if n.startswith("gemm_4bit_sm") and half in n],
        "adamw": [f"kOptimizer32bit2State<{half}, 0>"],
        "adamw 8 bits": [f"kOptimizerStatic8bit2StateBlockwise<{half}, 0, 256, 1>"],
    }
    resources, conflicts = _peer_report(architecture)
    entries = []
    for op, names in candidates.items():
        for name in names:
            entry = _peer_entry(op, name, functions[name], architecture, resources, conflicts)
            if entry is not None:
                entries.append(entry)
    return entries


def _peer_report(architecture: int) -> tuple[dict[str, int], dict[str, int]]:
    library = budget.peer_library()
    if library is None:
        return {}, {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = toolchain.extract(library, architecture, Path(folder))[0]
        registers = figures.registers(cubin)
        pattern = "gemm_4bit_s|kDequantizeBlockwise|kOptimizer"
        pattern = f"({pattern}).*(bfloat16|I6__half)"
        seen = figures.shared_accesses(cubin, "--kernel", pattern)
    return registers, {name: found["conflicting"] for name, found in seen.items()}


def _peer_entry(
    op: str,
    name: str,
    function: sass.Function,
    architecture: int,
    registers: dict[str, int],
    conflicts: dict[str, int],
) -> Entry | None:
    if op == "forward":
        path = function.hot_path("HMMA")
    elif op == "dequantize":
        path = function.hot_path("STG")
    elif op in STEP_BYTES:
        # An element whose gradient is 0 is left out.
        path = function.hot_path("STG", rich_in="MUFU")
    else:
        path = function.hot_path("LDG", 128)
    if path is None or (op == "forward" and not budget.decodes(path)):
        return None
    count = len(path.instructions)
    macs = path.multiply_adds if op == "forward" else 0
    known = architecture in sass.STALLS_KNOWN
    return Entry(
        *(PEER, op, name, architecture, registers[name]),
        function.count("LDL") + function.count("STL"),
        count,
        None if macs else count / _peer_weights(op, path),
        1000 * count / macs if macs else None,
        1000 * path.cycles / macs if macs and known else None,
        None if macs else path.shared_wavefronts / _peer_weights(op, path),
        1000 * path.shared_wavefronts / macs if macs else None,
        None if macs else path.alu / _peer_weights(op, path),
        1000 * path.alu / macs if macs else None,
        figures.tile_rows(name) if macs else 0,
        0,
        dict(sorted(path.widths.items())),
        conflicts.get(name),
        None,
    )


def modelled(entry: Entry, gpu: Gpu, rows: int, columns: int, m: int) -> dict[str, Any]:
    """The modelled seconds of an op on a weight, and what sets them."""
    weights = rows * columns
    moved = weights * STEP_BYTES.get(entry.op, BYTES_A_WEIGHT)
    limits = {}
    if entry.op == "dequantize":
        moved += 2.0 * weights
    elif entry.op not in STEP_BYTES:
        moved += 2.0 * m * (rows + columns)
    limits["memory"] = moved / (gpu.gbytes_s * 1e9)
    if entry.instructions_a_weight is not None:
        limits["issue"] = entry.instructions_a_weight * weights / 32 / gpu.issue_rate
    if entry.alu_a_weight is not None:
        limits["alu"] = entry.alu_a_weight * weights / 32 / gpu.alu_rate
    if entry.wavefronts_a_weight is not None:
        limits["shared"] = entry.wavefronts_a_weight * weights / 32 / gpu.wavefront_rate
    if entry.instructions_a_kilo_multiply_add is not None:
        kilo = weights * -(-m // entry.tile_rows) * entry.tile_rows / 1000
        limits["issue"] = entry.instructions_a_kilo_multiply_add * kilo / gpu.issue_rate
        share = 1.0 if entry.library in (TRITON, HOPPER) else gpu.mma_share
        limits["tensor"] = 2000 * kilo / (gpu.tensor_tflops * 1e12 * share)
        if entry.alu_a_kilo_multiply_add is not None:
            limits["alu"] = entry.alu_a_kilo_multiply_add * kilo / gpu.alu_rate
        if entry.wavefronts_a_kilo_multiply_add is not None:
            limits["shared"] = entry.wavefronts_a_kilo_multiply_add * kilo / gpu.wavefront_rate
        if entry.tile_columns:
            tile = 2.0 * entry.tile_rows + BYTES_A_WEIGHT * entry.tile_columns
            tile /= entry.tile_rows * entry.tile_columns
            limits["cache"] = 1000 * kilo * tile / (L2_BYTES * gpu.processors * gpu.boost_ghz * 1e9)
    bound = max(limits, key=lambda name: limits[name])
    return {
        "gpu": gpu.name,
        "library": entry.library,
        "op": entry.op,
        "kernel": entry.kernel,
        "m": m,
        "modelled_us": limits[bound] * 1e6,
        "bound": bound,
        "tensor_share": _tensor_share(entry, gpu, weights * m, limits[bound]),
        "roofline_us": max(limits["memory"], limits.get("tensor", 0.0)) * 1e6,
    }


def _tensor_share(entry: Entry, gpu: Gpu, products: int, seconds: float) -> float | None:
    """What of the tensor cores' dense peak the products come to."""
    if entry.op not in OURS_FOR_HOPPER:
        return None
    return 2 * products / (gpu.tensor_tflops * 1e12) / seconds


def models(
    entries: Sequence[Entry], rows: int, columns: int, batch: Sequence[int]
) -> list[dict[str, Any]]:
    """Of each library's kernels for an op the one with the least modelled time."""
    found = []
    for gpu in GPUS:
        here = [entry for entry in entries if entry.architecture == gpu.architecture]
        for op in OURS:
            for m in batch if op in ("forward", "dx") else (1,):
                for library in COLOURS:
                    times = [
                        modelled(e, gpu, rows, columns, m)
                        for e in here
                        if (e.library, e.op) == (library, op)
                    ]
                    if times:
                        found.append(min(times, key=lambda time: time["modelled_us"]))
    return found


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_table(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> None:
    cells = [list(fields)] + [[_cell(row[name]) for name in fields] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(fields))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def plot(times: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    gpus = list(dict.fromkeys(time["gpu"] for time in times))
    figure = Figure(figsize=(4 * len(gpus), 4.5), layout="constrained")
    axes = figure.subplots(1, len(gpus), squeeze=False)[0]
    for axis, gpu in zip(axes, gpus, strict=True):
        here = [time for time in times if time["gpu"] == gpu]
        labels = list(dict.fromkeys((time["op"], time["m"]) for time in here))
        for shift, (library, colour) in zip((-0.3, -0.1, 0.1, 0.3), COLOURS.items(), strict=True):
            mine = [time for time in here if time["library"] == library]
            places = [labels.index((time["op"], time["m"])) + shift for time in mine]
            axis.bar(places, [t["modelled_us"] for t in mine], 0.2, color=colour, label=library)
            axis.scatter(places, [t["roofline_us"] for t in mine], marker="_", color="k", s=90)
        names = [f"{op} M={m}" if op in ("forward", "dx") else op for op, m in labels]
        axis.set_xticks(range(len(labels)), names, rotation=60, ha="right", fontsize=8)
        axis.set_yscale("log")
        axis.set_title(gpu)
    axes[0].set_ylabel("modelled µs (black: memory and tensor cores alone)")
    axes[0].legend()
    figure.suptitle("Modelled from machine code, not measured")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_static.py", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 14336), help="of the weight")
    parser.add_argument(
        "--m", type=int, nargs="+", default=(16, 64, 128, 256, 512), help="rows of x"
    )
    parser.add_argument("--out", type=Path, help="folder for gpu_static.json and gpu_static.png")
    args = parser.parse_args(argv)
    if reason := toolchain.missing():
        print(f"gpu_static.py: {reason}", file=sys.stderr)
        return 1
    entries = []
    for architecture in args.arch:
        entries += our_entries(architecture) + triton_entries(architecture)
        entries += peer_entries(architecture)
    print("From the machine code; one round of the hot loop, with double-quantised scales:\n")
    print_table(
        [asdict(entry) for entry in entries],
        (
            *("architecture", "op", "library", "kernel", "registers", "local_accesses"),
            *("loop_instructions", "instructions_a_weight", "instructions_a_kilo_multiply_add"),
            *("cycles_a_kilo_multiply_add", "conflicting_shared_accesses"),
        ),
    )
    times = models(entries, *args.shape, args.m)
    print(f"\nMODELLED, not measured: weight {args.shape[0]} x {args.shape[1]}, bfloat16\n")
    print_table(
        times,
        (
            "gpu",
            "op",
            "m",
            "library",
            "modelled_us",
            "roofline_us",
            "bound",
            "tensor_share",
            "kernel",
        ),
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {
            "compiler": budget.compiler(),
            "triton": None if triton_compiler.missing() else triton_figures.triton_version(),
            "peer": str(getattr(budget.peer_library(), "name", None)),
            "shape": list(args.shape),
            "gpus": [asdict(gpu) for gpu in GPUS],
            "kernels": [asdict(entry) for entry in entries],
            "modelled_times": times,
        }
        (args.out / "gpu_static.json").write_text(json.dumps(content, indent=1) + "\n")
        plot(times, args.out / "gpu_static.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
