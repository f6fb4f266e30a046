"""What compilers made of loops that they are trusted to make vectors of."""

from __future__ import annotations

import platform
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
