"""The Triton kernels' machine code for GPUs that are not here: `budget.csv` of lab.triton.static.

The table has every launch and architecture as it is; getting worse fails.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from lab.cuda.static import toolchain
from lab.triton import proofs
from lab.triton.static import budget, figures, rules
from lab.triton.static import compile as compiler
from qkern import reference
from qkern.backends import triton

if reason := triton.missing_reason():
    pytest.skip(reason, allow_module_level=True)
if toolchain.disassembler_folder() is None:
    pytest.skip("cuobjdump and nvdisasm not found", allow_module_level=True)

QUICK = {90: "bf16-1", "gfx942": "bf16-1", 75: "dequantize_4bit-fp16"}
"""The calls that quick tests compile for, by architecture: those with this in their id."""
FULL = (75, 90, "gfx1100")
"""Architectures that slow tests compile all calls for; for the others those in one dtype."""

SCOPES = [
    *(pytest.param(arch, only, id=f"{arch}-{only}") for arch, only in QUICK.items()),
    *(
        pytest.param(a, "" if a in FULL else "bf16", id=str(a), marks=pytest.mark.slow)
        for a in compiler.ARCHITECTURES
    ),
]
scopes = pytest.mark.parametrize(("architecture", "only"), SCOPES)


@scopes
def test_no_kernel_is_worse_than_the_table(architecture: int | str, only: str) -> None:
    if figures.triton_version() != budget.table_compiler():
        pytest.skip(
            f"the table is of {budget.table_compiler()}: this is {figures.triton_version()}"
        )
    found = {budget.key_of(f): f for f in figures.kernel_figures(architecture, only)}
    committed = {
        key: f
        for key, f in budget.read_table().items()
        if f.architecture == str(architecture) and only in f.call
    }
    assert found.keys() == committed.keys(), "run: python -m lab.triton.static.budget --write"
    worse = {key: budget.regressions(f, committed[key]) for key, f in found.items()}
    assert {key: what for key, what in worse.items() if what} == {}


@scopes
def test_no_spills_wide_accesses_and_matrix_instructions(
    architecture: int | str, only: str
) -> None:
    found = figures.kernel_figures(architecture, only)
    assert found
    assert {budget.key_of(f): budget.faults(f) for f in found if budget.faults(f)} == {}


def test_the_table_has_every_architecture_and_meets_its_targets() -> None:
    table = budget.read_table()
    assert {f.architecture for f in table.values()} == set(map(str, compiler.ARCHITECTURES))
    assert {key: budget.faults(f) for key, f in table.items() if budget.faults(f)} == {}
    assert {f.call for f in table.values()} == set(compiler.calls())


ROUNDED = (
    *("quantize_", "dequantize_", "linear_4bit-bf16-512", "linear_4bit_dx-bf16-512"),
    *("grouped_linear_4bit-bf16-512", "grouped_linear_4bit-bf16-invariant"),
    *("grouped_linear_4bit_dx-bf16-512", "grouped_linear_4bit_dx-bf16-invariant"),
    *("adamw_step-fp32-32bit", "adamw_step-bf16-8bit_stochastic"),
)
"""Calls whose kernels have no fused sums: 16-bit products are the matrix instructions' business."""


@pytest.mark.parametrize(
    "architecture",
    [80, *(pytest.param(a, marks=pytest.mark.slow) for a in (75, 90, 100, "gfx942", "gfx1100"))],
)
def test_roundings_and_offsets(architecture: int | str) -> None:
    """Division is exact, nothing is contracted, and offsets into tensors have 64 bits."""
    judged = 0
    with compiler.compiling(architecture) as launched:
        for name, call in compiler.calls().items():
            if not name.startswith(ROUNDED) or (architecture == 75 and "linear" in name):
                continue
            call()
            for compiled in launched:
                assert rules.rounding_faults(compiled) == [], (name, compiled.name)
                assert rules.offset_faults(compiled) == [], (name, compiled.name)
                judged += 1
            launched.clear()
    assert judged >= 20


@pytest.mark.parametrize("name", ["linear_4bit", "linear_4bit_dx"])
@pytest.mark.parametrize("architecture", [90, "gfx942"])
def test_an_expert_multiplies_as_a_product_alone(architecture: int | str, name: str) -> None:
    """In batch-invariant mode: by the same matrix instructions, which add in their own order."""
    with compiler.compiling(architecture) as launched:
        for call in (f"{name}-bf16-1", f"grouped_{name}-bf16-invariant"):
            compiler.calls()[call]()
        alone, grouped = (c for c in launched if "linear" in c.name)
    kinds = r"mma\.sync\S+|wgmma\S+|tcgen05\.mma\S*|v_w?mfma\w+|v_wmma\w+"
    used = [
        set(re.findall(kinds, compiled.asm["ptx" if architecture == 90 else "amdgcn"]))
        for compiled in (alone, grouped)
    ]
    assert len(used[0]) == 1
    assert used[0] == used[1]


def test_adamw_of_tensors_anywhere_reads_no_wider_than_they_allow() -> None:
    """What is at a multiple of 4 bytes is read 4 bytes at a time; the table has words of 8."""
    tensors = ([torch.empty(4097)[1:]] for _ in range(4))
    with compiler.compiling(80) as launched:
        torch.ops.qkern.adamw_step(*tensors, [], [], torch.empty(1, reference.ADAMW_FACTORS))
        (compiled,) = launched
    found = figures.of("unaligned", compiled, 80)
    assert (found.load_bits, found.store_bits) == (64, 32)


def test_a_row_that_got_worse_is_named() -> None:
    row = figures.Figures(
        "linear_4bit-bf16-1", "linear_4bit_kernel", "90", 96, 0, 0, 1, 8, 128, 128, 9
    )
    assert budget.regressions(row, row) == []
    assert budget.faults(row) == []
    worse = dataclasses.replace(row, spills=3, load_bits=64, matrix_instructions=0)
    assert budget.regressions(worse, row) == [
        "spills: 3, was 0",
        "matrix_instructions: 0, was 8",
        "load_bits: 64, was 128",
    ]
    assert len(budget.faults(worse)) == 3


PROVABLE = {
    "sum_kernel": "quantize_absmax-fp32",
    "mean_kernel": "quantize_absmax-fp32",
    "sum_parts_kernel": "linear_4bit-bf16-1",
}
"""Kernels without a table in shared memory, by a call that launches them. Addresses that depend on
data, as those of look-ups and of AdamW's tensors do, are beyond sentryward."""


@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", PROVABLE)
def test_race_free(kernel: str, architecture: int, tmp_path: Path) -> None:
    pytest.importorskip("sentryward")
    with compiler.compiling(architecture) as launched:
        compiler.calls()[PROVABLE[kernel]]()
        (compiled,) = (c for c in launched if c.name == kernel)
        answer = proofs.prove(compiled, tmp_path)
    assert answer["result"] == "race_free", answer["diagnostics"]


def test_a_race_is_not_proved_away(tmp_path: Path) -> None:
    """The same kernel with every program storing to the first one's place."""
    pytest.importorskip("sentryward")
    with compiler.compiling(80) as launched:
        compiler.calls()[PROVABLE["sum_parts_kernel"]]()
        (compiled,) = (c for c in launched if c.name == "sum_parts_kernel")
        ptx = compiled.asm["ptx"]
        assert ptx.count("%ctaid.x") == 1
        asm = compiled.asm | {"ptx": ptx.replace("%ctaid.x", "0")}
        answer = proofs.prove(dataclasses.replace(compiled, asm=asm), tmp_path)
    assert answer["result"] == "potential_race", answer["diagnostics"]
