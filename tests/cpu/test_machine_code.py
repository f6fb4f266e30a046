"""What compilers made of loops that they are trusted to make vectors of."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from qkern.backends import cpu

pytestmark = [
    pytest.mark.skipif(cpu.missing_reason() is not None, reason="qkern._C is not built"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64's instructions"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump"),
]


def functions(name: str) -> list[str]:
    """The disassembly of each of the library's functions whose name contains ``name``."""
    library = cpu.library().__file__
    symbols = subprocess.run(
        ["nm", "-C", "-S", library], check=True, capture_output=True, text=True
    ).stdout
    found = []
    for line in symbols.splitlines():
        address, size, *rest = line.split(maxsplit=3)
        if len(rest) == 2 and rest[0] in "tT" and name in rest[1]:
            start = int(address, 16)
            where = f"--start-address={start}", f"--stop-address={start + int(size, 16)}"
            command = ["objdump", "-d", "--no-show-raw-insn", *where, library]
            found.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def test_an_optimizer_step_is_of_vectors() -> None:
    """A branch in the loop leaves one element at a time, at half the speed."""
    found = functions("::adamw_floats<")
    if not found:
        pytest.skip("no such function by name: inlined, or symbols are stripped")
    for code in found:
        assert "sqrtps" in code
        assert "divps" in code


def loops(code: str) -> list[list[str]]:
    """The instructions from the target of each jump backwards to the jump, the shortest first."""
    lines = [line.split("\t") for line in code.splitlines()]
    code_at = {int(line[0].strip(" :"), 16): line[1] for line in lines if len(line) == 2}
    places, instructions = list(code_at), list(code_at.values())
    found = []
    for end, instruction in enumerate(instructions):
        target = re.match(r"j\w+ +([0-9a-f]+)", instruction)
        if target and int(target[1], 16) in code_at:
            begin = places.index(int(target[1], 16))
            if begin < end:
                found.append(instructions[begin : end + 1])
    return sorted(found, key=len)


def test_a_forward_of_one_row_keeps_its_sums_in_registers() -> None:
    """An array of sums that the compiler takes for memory is stored again in every turn."""
    products = re.compile("v?p(maddwd|maddubsw|dpwssd|dpbusd)")
    store = re.compile(r"[xyz]mm\d+,.*\(%rsp\)$")
    checked = 0
    for kernel in ("DotKernel", "Int8Kernel"):
        # One row of x, two of W, no more than one scale a register of codes.
        for code in functions(f"{kernel}, 1, 2, true>(unsigned char"):
            inner = [loop for loop in loops(code) if any(map(products.match, loop))]
            assert not any(map(store.search, inner[0] if inner else [])), code
            checked += bool(inner)
    if not checked:
        pytest.skip(
            "no such function by name: the compiler has inlined it, or symbols are stripped"
        )
