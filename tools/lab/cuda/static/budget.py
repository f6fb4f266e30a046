"""The committed table of figures, and the targets that each row is held to.

``PYTHONPATH=tools python -m lab.cuda.static.budget [--write] [ARCH ...]`` prints the table, with
every target that is missed; ``--write`` replaces the committed rows of these architectures.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import figures, sass, toolchain
from .figures import Figures

TABLE = Path(__file__).with_name("budget.csv")
FIELDS = (
    *("architecture", "kernel", "registers", "shared_bytes", "warps", "occupancy"),
    *("tensor_instructions", "wide_stores", "loop_instructions", "instructions_a_weight"),
    *("cycles_a_kilo_multiply_add", "shared_wavefronts", "alu_instructions"),
)
Row = dict[str, str]
DEQUANTIZE_INSTRUCTIONS = 8.0
VECTOR_INSTRUCTIONS = 4.5
ISSUED_A_BYTE = {75: 25.4, 80: 9.56, 86: 19.0, 89: 41.0, 90: 9.23}
"""Instructions of a thread that a GPU issues while its memory moves a byte, by the datasheets of
T4, A100 80GB, RTX 3090, RTX 4090 and H100 SXM: with more, memory is not what a kernel waits for."""
MULTIPLY_ADDS_A_CYCLE = {75: 512, 80: 1024, 86: 512, 89: 512, 90: 1280, 100: 1024, 120: 512}
"""Of a multiprocessor's tensor cores by ``mma.sync``: 16-bit inputs, float32 sums. Datasheet peaks
over processors and clock; on 9.0 and 10.0, whose peaks are of other instructions, assumed."""
HOPPER_MULTIPLY_ADDS_A_CYCLE = 2048
"""By ``wgmma``, on 9.0: H100's datasheet."""
PEER_KERNEL = "gemm_4bit_sm80_m16n8k16"


@dataclass(frozen=True, slots=True)
class Target:
    """A limit for one figure of a kernel."""

    name: str
    value: float
    limit: float

    @property
    def reached(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.2f}, at most {self.limit:.2f}"


def row_of(f: Figures) -> Row:
    """A row of the table."""
    hot = f.hot
    a_weight = hot.instructions_a_weight if hot else None
    cycles = hot.cycles_a_kilo_multiply_add if hot else None
    values = (
        *(f.architecture, f.kernel, f.registers, f.shared_bytes, f.warps, f"{f.occupancy:.1%}"),
        *(f.tensor_instructions, f.wide_stores, hot.instructions if hot else ""),
        "" if a_weight is None else f"{a_weight:.2f}",
        "" if cycles is None else f"{cycles:.2f}",
        *((hot.shared_wavefronts, hot.alu) if hot else ("", "")),
    )
    return {name: str(value) for name, value in zip(FIELDS, values, strict=True)}


def read_table() -> dict[tuple[int, str], Row]:
    """The committed rows by architecture and kernel."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {(int(row["architecture"]), row["kernel"]): row for row in rows}


def table_compiler() -> str:
    """The release of nvcc that the committed rows are of."""
    return TABLE.read_text().splitlines()[0].removeprefix("# ")


def compiler() -> str:
    """The release of the nvcc here, as ``nvcc 13.0``."""
    text = toolchain.run([toolchain.nvcc() or "nvcc", "--version"])
    return f"nvcc {text.partition('release ')[2].partition(',')[0]}"


def regressions(now: Row, committed: Row) -> list[str]:
    """What is worse than the committed row, in words."""
    found = []
    for name in FIELDS[2:]:
        new, old = now[name].rstrip("%"), committed[name].rstrip("%")
        if new == old:
            continue
        more_is_better = name in ("warps", "occupancy", "tensor_instructions", "wide_stores")
        worse = not new or (old and (float(new) < float(old)) == more_is_better)
        if worse:
            found.append(f"{name}: {new or 'none'}, was {old}")
    return found


def peer_library() -> Path | None:
    """Bitsandbytes' library for CUDA 13.0, or its newest; None where it is not installed."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    found = sorted(folder.glob("libbitsandbytes_cuda*.so"))
    return next((path for path in found if path.stem.endswith("130")), found[-1] if found else None)


@functools.cache
def peer_functions(architecture: int) -> dict[str, sass.Function]:
    """The machine code of the peer's library by short name."""
    library = peer_library()
    if library is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        code = figures.parse_cubin(toolchain.extract(library, architecture, Path(folder))[0])
    names = figures.demangle([function.name for function in code])
    return dict(zip(names, code, strict=True))


def decodes(path: sass.Path) -> bool:
    """Whether a round of a peer's loop makes the 16-bit weights that its products take.

    The rule for a variant to count: where it decodes in another loop than it multiplies in, the
    main path of the loop with the products is no round's work.
    """
    return path.count("F2FP") > 0


@functools.cache
def peer_cycles(architecture: int) -> dict[str, float]:
    """Estimated cycles a thousand multiply-adds of the peer's tensor-core kernels that count."""
    found = {}
    for name, function in peer_functions(architecture).items():
        if name.startswith(PEER_KERNEL) and function.count("HMMA"):
            path = function.hot_path("HMMA")
            if path is not None and decodes(path):
                found[name] = 1000 * path.cycles / path.multiply_adds
    return found


def peer_limit(architecture: int, kernel: str) -> float | None:
    """The fewest cycles a thousand multiply-adds that the peer takes for a tile's rows of x.

    Of all its variants of the same type. One with larger tiles computes rows that do not exist,
    one with smaller tiles decodes again.
    """
    rows = figures.tile_rows(kernel)
    found = []
    for name, cycles in peer_cycles(architecture).items():
        if ("__half" in name) == ("Float16" in kernel.replace("BFloat16", "")):
            peer_rows = figures.tile_rows(name)
            found.append(cycles * -(-rows // peer_rows) * peer_rows / rows)
    return min(found, default=None)


def step_bytes(parameters: str, moments: str) -> float:
    """What an optimizer's step moves for a parameter: three of it, four of a moment."""
    size = 4 if parameters == "float" else 2
    return 3 * size + (16 if moments == "float" else 4 + 4 * 4 / 256)


def targets(f: Figures) -> list[Target]:
    """The targets of a kernel, reached or not."""
    found = [
        Target("local_accesses", f.local_accesses, 0),
        Target("stack_bytes", f.stack_bytes, 0),
    ]
    if f.hot is None:
        return found
    a_weight = f.hot.instructions_a_weight
    name = f.kernel.partition("<")[0].removeprefix(figures.BY_EXPERTS)
    arguments = figures.template_arguments(f.kernel)
    if name == "dequantize_4bit_kernel" and a_weight is not None:
        found.append(Target("instructions_a_weight", a_weight, DEQUANTIZE_INSTRUCTIONS))
    if name == "linear_4bit_vector_kernel" and arguments[1] == "1" and a_weight is not None:
        found.append(Target("instructions_a_weight", a_weight, VECTOR_INSTRUCTIONS))
    if name == "adamw_step_kernel" and a_weight is not None and f.architecture in ISSUED_A_BYTE:
        limit = ISSUED_A_BYTE[f.architecture] * step_bytes(*arguments)
        found.append(Target("instructions_a_weight", a_weight, limit))
    if f.hot.multiply_adds:
        # In cycles of a multiprocessor, whose four parts issue and multiply by themselves.
        rate = MULTIPLY_ADDS_A_CYCLE[f.architecture]
        if "wgmma" in name:
            rate = HOPPER_MULTIPLY_ADDS_A_CYCLE
        other = max(f.hot.instructions / 4, f.hot.multiply_adds / rate)
        found.append(Target("shared_wavefronts", f.hot.shared_wavefronts, other))
    cycles = f.hot.cycles_a_kilo_multiply_add
    if cycles is not None and (limit := peer_limit(f.architecture, f.kernel)) is not None:
        found.append(Target("cycles_a_kilo_multiply_add", cycles, limit))
    return found


def write_table(rows: dict[tuple[int, str], Row]) -> None:
    """Replace the committed table."""
    with TABLE.open("w", newline="") as file:
        file.write(f"# {compiler()}\n")
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for key in sorted(rows):
            writer.writerow(rows[key])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.cuda.static.budget", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the committed rows")
    parser.add_argument("architectures", nargs="*", type=int, default=toolchain.ARCHITECTURES)
    args = parser.parse_args()
    rows = read_table() if args.write and TABLE.exists() else {}
    print("  ".join(FIELDS))
    for architecture in args.architectures:
        found = figures.kernel_figures(architecture)
        rows = {key: row for key, row in rows.items() if key[0] != architecture}
        for kernel, f in found.items():
            row = rows[architecture, kernel] = row_of(f)
            print("  ".join(row[name] or "-" for name in FIELDS))
            for target in targets(f):
                if not target.reached:
                    print(f"    MISSED {target}")
    if args.write:
        write_table(rows)


if __name__ == "__main__":
    main()
