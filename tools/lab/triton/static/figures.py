"""What the machine code of Triton's kernels says: registers, spills, accesses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import ROOT
from lab.cuda.static import sass, toolchain
from lab.kept import kept

from . import compile as compiler
from .compile import Compiled

_SOURCES = (
    *(ROOT / "triton_kernels").glob("*.py"),
    *Path(__file__).parent.glob("*.py"),
    ROOT / "qkern" / "backends" / "_triton.py",
)


@dataclass(frozen=True, slots=True)
class Figures:
    """A kernel for one architecture, as one call launches it."""

    call: str
    """Op, dtype and what else tells the calls of `compile.calls` apart."""
    kernel: str
    architecture: str
    registers: int
    """Of a thread: NVIDIA's 32-bit registers, AMD's vector registers."""
    spills: int
    """Accesses to local memory (NVIDIA) or scratch (AMD); 0 where all fits registers."""
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: int
    load_bits: int
    """Width of the widest load from global memory, asynchronous copies included."""
    store_bits: int
    instructions: int


def triton_version() -> str:
    """``triton 3.9.0``, as the budget's first line says."""
    import triton

    return f"triton {triton.__version__}"


_MATRIX = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA)")


@contextlib.contextmanager
def _cubin(compiled: Compiled) -> Iterator[tuple[Path, Path]]:
    """cuobjdump, and a file that it can read."""
    disassemblers = toolchain.disassembler_folder()
    if disassemblers is None:
        raise toolchain.ToolError("cuobjdump not found")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        yield disassemblers / "cuobjdump", path


def machine_code(compiled: Compiled) -> sass.Function:
    """The machine code of a kernel for one of NVIDIA's architectures."""
    with _cubin(compiled) as (tool, path):
        (code,) = sass.parse(toolchain.run([tool, "-sass", path]))
    return code


def _of_cubin(call: str, compiled: Compiled, architecture: int | str) -> Figures:
    with _cubin(compiled) as (tool, path):
        used = toolchain.run([tool, "--dump-resource-usage", path])
    code = machine_code(compiled)
    resources = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}

    def widest(*bases: str) -> int:
        return max((i.bits for i in code.instructions if i.base in bases), default=0)

    return Figures(
        *(call, compiled.name, str(architecture), resources["REG"]),
        spills=code.count("LDL") + code.count("STL"),
        stack_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=compiled.shared_bytes,
        matrix_instructions=sum(bool(_MATRIX.match(i.opcode)) for i in code.instructions),
        load_bits=widest("LDG", "LDGSTS"),
        store_bits=widest("STG"),
        instructions=len(code.instructions),
    )


_AMD_WIDTHS = (
    *(("dwordx4", 128), ("b128", 128), ("dwordx3", 96), ("b96", 96), ("dwordx2", 64), ("b64", 64)),
    *(("dword", 32), ("b32", 32), ("short", 16), ("b16", 16), ("u16", 16), ("byte", 8), ("b8", 8)),
    *(("u8", 8), ("i8", 8)),
)


def _amd_bits(opcode: str) -> int:
    return next(bits for text, bits in _AMD_WIDTHS if text in opcode)


def _of_amdgcn(call: str, compiled: Compiled, architecture: int | str) -> Figures:
    text = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    opcodes = Counter(re.findall(r"^\t([a-z][a-z0-9_]+)(?:\s|$)", text, re.MULTILINE))

    def widest(kind: str) -> int:
        pattern = re.compile(rf"^(global|buffer)_{kind}_")
        return max((_amd_bits(o) for o in opcodes if pattern.match(o)), default=0)

    return Figures(
        *(call, compiled.name, str(architecture), metadata("vgpr_count")),
        spills=sum(n for o, n in opcodes.items() if o.startswith("scratch_"))
        + metadata("vgpr_spill_count"),
        stack_bytes=metadata("private_segment_fixed_size"),
        shared_bytes=compiled.shared_bytes,
        matrix_instructions=sum(
            n for o, n in opcodes.items() if o.startswith(("v_mfma", "v_wmma"))
        ),
        load_bits=widest("load"),
        store_bits=widest("store"),
        instructions=sum(opcodes.values()),
    )


def of(call: str, compiled: Compiled, architecture: int | str) -> Figures:
    """The figures of one compiled kernel."""
    measure = _of_cubin if "cubin" in compiled.asm else _of_amdgcn
    return measure(call, compiled, architecture)


def kernel_figures(architecture: int | str, only: str = "") -> list[Figures]:
    """Figures of every launch of `compile.calls`, kept on disk by the state of the code."""
    digest = hashlib.sha256(f"{triton_version()} {architecture} {only}".encode())
    for source in sorted(_SOURCES):
        digest.update(source.read_bytes())
    name = f"{architecture}.{digest.hexdigest()[:16]}"

    def measure(partial: Path) -> None:
        found = list(_compile_all(architecture, only))
        partial.write_text(json.dumps([asdict(f) for f in found]))

    file = kept(ROOT / "build" / "triton_static" / f"{name}.json", measure)
    return [Figures(**row) for row in json.loads(file.read_text())]


def _compile_all(architecture: int | str, only: str) -> Iterable[Figures]:
    with compiler.compiling(architecture) as launched:
        for name, call in compiler.calls(only).items():
            call()
            for compiled in launched:
                yield of(name, compiled, architecture)
            launched.clear()
