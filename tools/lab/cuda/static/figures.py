"""The figures of each kernel: registers, spills, occupancy, the cost of a round of its hot loop."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab import ROOT

from . import sass, toolchain


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched, as its file says; sizes of structs are asked of the compiler."""

    threads: int | str
    """Or a C++ constant, with the kernel's own template arguments as ``{0}``, ``{1}``..."""
    shared_struct: str | None = None
    """C++ type whose size is the dynamic shared memory, with the kernel's own template arguments
    as ``{0}``, ``{1}``..."""
    hot: tuple[str, int | None] | None = None
    """Instruction, and bits if it is a memory access, of which the hot loop has most."""
    rich_in: str = "LDG"
    """What its main path has most of: see `sass.Function.main_path`."""


_MATMULS = {
    "linear_4bit_dx_mma_kernel": Launch(128, "DxShared<{1}, {2}>", ("HMMA", None)),
    "linear_4bit_mma_kernel": Launch(
        "BlockShape<{1}>::kThreads", "MmaShared<{1}, {2}>", ("HMMA", None)
    ),
    "linear_4bit_tiled_kernel": Launch(256),
    "linear_4bit_vector_kernel": Launch(
        "kThreads * VectorShared<{0}, {1}>::kGroups", "VectorShared<{0}, {1}>", ("FFMA", None)
    ),
}
BY_EXPERTS = "grouped_"
"""What the names begin with of kernels that do for experts what others do for one weight."""
LAUNCHES = {
    **_MATMULS,
    **{f"{BY_EXPERTS}{name}": launch for name, launch in _MATMULS.items()},
    "absmax_mean_kernel": Launch(1024),
    # Codes are looked up. The factors of a parameter's first round are not counted.
    "adamw_step_kernel": Launch(128, hot=("STG", 128), rich_in="LDS"),
    "dequantize_4bit_kernel": Launch(256, hot=("STG", 128)),
    "dequantize_8bit_kernel": Launch(256),
    "grouped_matmul_into_kernel": Launch(256),
    "linear_4bit_dx_wgmma_kernel": Launch(256, "DxWgmmaShared", ("HGMMA", None)),
    "linear_4bit_wgmma_kernel": Launch(256, "WgmmaShared<{1}>", ("HGMMA", None)),
    "quantize_4bit_kernel": Launch(256),
    "quantize_8bit_kernel": Launch(256),
    "quantize_absmax_kernel": Launch(256),
    "sum_splits_kernel": Launch(256),
}


@dataclass(frozen=True, slots=True)
class Processor:
    """Limits of one streaming multiprocessor (CUDA Programming Guide, compute capabilities)."""

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int
    """Of shared memory, taken by the system for each block."""
    register_file: int = 65536


PROCESSORS = {
    75: Processor(32, 16, 64 << 10, 0),
    80: Processor(64, 32, 164 << 10, 1024),
    86: Processor(48, 16, 100 << 10, 1024),
    89: Processor(48, 24, 100 << 10, 1024),
    90: Processor(64, 32, 228 << 10, 1024),
    100: Processor(64, 32, 228 << 10, 1024),
    120: Processor(48, 24, 100 << 10, 1024),
}


def resident_warps(architecture: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Warps of a kernel that a multiprocessor holds at once."""
    processor = PROCESSORS[architecture]
    warps = -(-threads // 32)
    # Registers are handed out to a warp in pieces of 256, so a thread has a multiple of 8.
    warp_registers = -(-registers // 8) * 8 * 32
    by_registers = processor.register_file // warp_registers // warps
    blocks = min(processor.warps // warps, processor.blocks, by_registers)
    block_bytes = shared_bytes + processor.reserved_bytes
    if block_bytes:
        blocks = min(blocks, processor.shared_bytes // (-(-block_bytes // 128) * 128))
    return blocks * warps


@dataclass(frozen=True, slots=True)
class HotLoop:
    """A round of the hot loop by its main path, with double-quantised scales, of one warp."""

    instructions: int
    cycles: int | None
    """Estimate: the compiler's schedule, no waiting for memory; None where it is not known."""
    weights: int
    """That each thread decodes or updates, 0 if that is not visible."""
    multiply_adds: int
    """Of the warp, on tensor cores."""
    shared_wavefronts: int
    """Of the warp."""
    alu: int
    """Instructions among them of which a quarter of a processor takes one every other clock."""
    accesses: dict[str, int]

    @property
    def instructions_a_weight(self) -> float | None:
        return self.instructions / self.weights if self.weights else None

    @property
    def cycles_a_kilo_multiply_add(self) -> float | None:
        if not self.multiply_adds or self.cycles is None:
            return None
        return 1000 * self.cycles / self.multiply_adds


@dataclass(frozen=True, slots=True)
class Figures:
    """What the machine code of one kernel for one architecture says."""

    kernel: str
    architecture: int
    registers: int
    stack_bytes: int
    local_accesses: int
    """Loads and stores of local memory: spills, or arrays that did not fit registers."""
    shared_bytes: int
    threads: int
    warps: int
    occupancy: float
    tensor_instructions: int
    wide_stores: int
    """128-bit stores to global memory, anywhere in the kernel."""
    hot: HotLoop | None = field(default=None)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names as a person writes them, without parameters and without qkern's namespaces."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [_short(name) for name in done.stdout.splitlines()]


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|qkern::cuda::|qkern::", "", name)
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ").strip()


def template_arguments(kernel: str) -> list[str]:
    """``["Float16", "16", "3"]`` of ``name<Float16, 16, 3>``."""
    inside = re.search(r"<(.*)>$", kernel)
    return [part.strip() for part in inside[1].split(",")] if inside else []


def tile_rows(kernel: str) -> int:
    """Rows of x that a block of a tensor-core kernel takes, of this library or the peer's."""
    if kernel.startswith("linear_4bit_dx_wgmma_kernel"):
        return 128
    return int(template_arguments(kernel)[1])


def constants(source: Path, expressions: Iterable[str]) -> dict[str, int]:
    """Values of constants in ``qkern::cuda`` of a kernel file, as the C++ compiler has them."""
    names = sorted(set(expressions))
    if not names:
        return {}
    emulator = ROOT / "tools" / "lab" / "cuda" / "emulator" / "include"
    text = f'#include "{source}"\nusing namespace qkern;\nusing namespace qkern::cuda;\n'
    text += f'extern "C" const unsigned long long qkern_constants[] = {{{", ".join(names)}}};\n'
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "constants.cpp"
        probe.write_text(text)
        includes = [f"-I{path}" for path in (emulator, source.parent, ROOT / "csrc/include")]
        command = [os.environ.get("CXX", "g++"), "-std=c++17", "-w", "-S", "-o", "-"]
        assembly = toolchain.run([*command, "-DQKERN_CUDA_EMULATED=1", *includes, probe])
    listed = assembly.split("qkern_constants:", 1)[1]
    numbers = re.findall(r"^\s*\.(?:quad|xword)\s+(\d+)\s*$", listed, re.MULTILINE)
    return dict(zip(names, map(int, numbers[: len(names)]), strict=True))


def _resources(cubin: Path) -> dict[str, dict[str, int]]:
    folder = toolchain.disassembler_folder()
    assert folder is not None
    text = toolchain.run([folder / "cuobjdump", "--dump-resource-usage", cubin])
    found = re.findall(r"Function (\S+):\s*\n\s*(.*)", text)
    return {
        name: {
            key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", rest)
        }
        for name, rest in found
    }


def registers(cubin: Path) -> dict[str, int]:
    """Registers of each kernel of a cubin by short name."""
    used = _resources(cubin)
    names = demangle(list(used))
    return {name: used[full]["REG"] for name, full in zip(names, used, strict=True)}


def parse_cubin(cubin: Path) -> list[sass.Function]:
    """The machine code of a cubin."""
    folder = toolchain.disassembler_folder()
    assert folder is not None
    return sass.parse(toolchain.run([folder / "cuobjdump", "-sass", cubin]))


def weights_of(kernel: str, path: sass.Path) -> int:
    """Weights that a thread decodes, or parameters that it updates, in a round of the hot loop."""
    name = kernel.partition("<")[0].removeprefix(BY_EXPERTS)
    if name == "adamw_step_kernel":
        # With 4 bytes they are stored four at a time, as moments of 4 bytes are.
        parameters, moments = template_arguments(kernel)
        size = 4 if parameters == "float" else 2
        if moments == "float":
            stored = 16 * path.count("STG", 128) + 8 * path.count("STG", 64)
            return stored // (size + 8)
        return 16 * path.count("STG", 128) // size
    if name == "dequantize_4bit_kernel":
        size = 4 if template_arguments(kernel)[0] == "float" else 2
        return path.count("STG", 128) * 16 // size
    if name == "linear_4bit_vector_kernel":
        # Packed codes are loaded 32 at a time; x goes on to shared memory.
        return 32 * (path.count("LDG", 128) - path.count("STS", 128))
    return 0


def hot_loop(
    kernel: str, function: sass.Function, architecture: int, launch: Launch
) -> HotLoop | None:
    if launch.hot is None:
        return None
    path = function.hot_path(*launch.hot, launch.rich_in)
    if path is None:
        return None
    return HotLoop(
        instructions=len(path.instructions),
        cycles=path.cycles if architecture in sass.STALLS_KNOWN else None,
        weights=weights_of(kernel, path),
        multiply_adds=path.multiply_adds,
        shared_wavefronts=path.shared_wavefronts,
        alu=path.alu,
        accesses=dict(sorted(path.widths.items())),
    )


def kernel_figures(architecture: int, kernels: Path = toolchain.KERNELS) -> dict[str, Figures]:
    """Figures of all kernels for an architecture, by name; compiles what is not compiled yet."""
    result: dict[str, Figures] = {}
    for source in toolchain.sources(architecture, kernels):
        result |= file_figures(source, architecture)
    return dict(sorted(result.items()))


def file_figures(source: Path, architecture: int) -> dict[str, Figures]:
    """Figures of the kernels of one file."""
    cubin = toolchain.compile_kernels(source, architecture)
    resources = _resources(cubin)
    code = parse_cubin(cubin)
    names = demangle([function.name for function in code])
    launched = {name: (_shared_size(name), _threads(name)) for name in names}
    values = constants(source, [text for pair in launched.values() for text in pair if text])
    result = {}
    for name, function in zip(names, code, strict=True):
        launch = LAUNCHES[name.partition("<")[0]]
        used = resources[function.name]
        shared_size, threads = (values[text] if text else 0 for text in launched[name])
        own = used["SHARED"]
        if architecture >= 90 and own > 0:
            # The system's own part is in the figure.
            own -= PROCESSORS[architecture].reserved_bytes
        shared = own + shared_size
        warps = resident_warps(architecture, threads, used["REG"], shared)
        result[name] = Figures(
            kernel=name,
            architecture=architecture,
            registers=used["REG"],
            stack_bytes=used["STACK"],
            local_accesses=function.count("LDL") + function.count("STL"),
            shared_bytes=shared,
            threads=threads,
            warps=warps,
            occupancy=warps / PROCESSORS[architecture].warps,
            tensor_instructions=sum(map(function.count, sass.PRODUCTS)),
            wide_stores=sum(i.base == "STG" and i.bits == 128 for i in function.instructions),
            hot=hot_loop(name, function, architecture, launch),
        )
    return result


def _shared_size(kernel: str) -> str | None:
    """The constant that is a kernel's dynamic shared memory in bytes."""
    name = kernel.partition("<")[0]
    if name not in LAUNCHES:
        raise KeyError(f"{name}: a kernel that lab.cuda.static.figures.LAUNCHES does not have")
    pattern = LAUNCHES[name].shared_struct
    return f"sizeof({pattern.format(*template_arguments(kernel))})" if pattern else None


def _threads(kernel: str) -> str:
    """The constant that is a kernel's threads."""
    return str(LAUNCHES[kernel.partition("<")[0]].threads).format(*template_arguments(kernel))


def _cuxray(command: str, cubin: Path, *options: str, hash_seed: int = 0) -> dict[str, Any]:
    folder = toolchain.disassembler_folder()
    assert folder is not None
    program = Path(sysconfig.get_path("scripts")) / "cuxray"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out.json"
        done = subprocess.run(
            [program, command, cubin, "--json", "-o", output, *options],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ
            | {"CUXRAY_TOOLCHAIN": str(folder), "CUXRAY_NO_FETCH": "1"}
            | {"PYTHONHASHSEED": str(hash_seed)},
        )
        if done.returncode:
            raise toolchain.ToolError(done.stdout + done.stderr)
        return json.loads(output.read_text())


def shared_accesses(cubin: Path, *options: str) -> dict[str, dict[str, int]]:
    """What cuxray says of each kernel's accesses to memory.

    ``conflicting`` ones to shared memory, and how many, to any memory, it ``followed`` or not: it
    knows addresses that are linear in the lane. Kept beside the cubin, for it takes seconds.
    """
    kept = cubin.with_suffix(".cuxray.json")
    if not options and kept.exists():
        return json.loads(kept.read_text())
    units = _cuxray("report", cubin, "--fast", "--no-cache", *options)["units"]
    kernels = [kernel for unit in units for kernel in unit["kernels"]]
    names = demangle([kernel["name"] for kernel in kernels])
    found = {
        name: {
            "conflicting": kernel["access"]["conflicted_shared_accesses"],
            "followed": kernel["access"]["analyzed_count"],
            "not_followed": kernel["access"]["unanalyzed_count"],
        }
        for name, kernel in zip(names, kernels, strict=True)
        if kernel["access"] is not None
    }
    if not options:
        kept.write_text(json.dumps(found))
    return found


def cuxray_loop_cycles(cubin: Path, hash_seeds: Iterable[int]) -> set[int]:
    """Cuxray's estimated cycles of each loop that it finds.

    It goes through blocks in the order of a set: which loops it takes for whole depends on the
    seed of Python's hashes.
    """
    return {
        loop["est_issue_stall_cycles_per_iter"]
        for seed in hash_seeds
        for kernel in _cuxray("sched", cubin, hash_seed=seed)["results"]
        for loop in kernel["loops"]
    }
