"""What the compilers' text must not hold, though results on a CPU would be the same."""

from __future__ import annotations

import re

from .compile import Compiled

_TABLE_SIZE = 256
"""Offsets into tables of at most this many entries may have 32 bits."""


def rounding_faults(compiled: Compiled) -> list[str]:
    """Roundings that are not those of the contract: approximate, contracted, or flushed to zero.

    Not for kernels whose products are sums in float32 by scalar instructions: these are fused.
    """
    ptx = compiled.asm.get("ptx")
    if ptx is None:
        return _amd_rounding_faults(compiled)
    found = [
        f"{opcode} in the PTX"
        for opcode in sorted(set(re.findall(r"^\s+(?:@%p\d+ )?([a-z0-9.]+)\s", ptx, re.MULTILINE)))
        if re.match(r"(fma|mad)\.\w+(\.\w+)*\.?f32|div\.(full|approx)|rcp|.*\.ftz", opcode)
    ]
    wanted = ["div.rn.f32"] * compiled.name.startswith(("quantize", "adamw"))
    wanted += ["sqrt.rn.f32"] * compiled.name.startswith("adamw")
    return found + [f"no {opcode} in the PTX" for opcode in wanted if opcode not in ptx]


def _amd_rounding_faults(compiled: Compiled) -> list[str]:
    """From LLVM's text: in machine code, exact division is itself made of fused multiply-adds."""
    llir = compiled.asm["llir"]
    flags = r"\bf(?:add|sub|mul|div) (?:[a-z]+ )*?(fast|contract|arcp|afn|reassoc)\b"
    found = [f"{flag} in LLVM's text" for flag in sorted(set(re.findall(flags, llir)))]
    divides = compiled.name.startswith(("quantize", "adamw"))
    if divides and not re.search(r"= fdiv (<\d+ x )?float", llir):
        found.append("no exact division in LLVM's text")
    if compiled.name.startswith("adamw"):
        # Without a bound on its error, a root is exact.
        roots = re.findall(r"@llvm\.sqrt.*", llir)
        found += ["a root that is not exact" for root in roots if "!fpmath" in root]
        found += [] if roots else ["no root in LLVM's text"]
    if ".amdhsa_float_denorm_mode_32 3" not in compiled.asm["amdgcn"]:
        found.append("subnormals are flushed")
    return found


def offset_faults(compiled: Compiled) -> list[str]:
    """Offsets into tensors of any size that have 32 bits only."""
    pattern = r"tt\.addptr %\S+, (%\S+) : (tensor<([\dx]+)x!tt\.ptr<\w+>>|!tt\.ptr<\w+>), (\S+)"
    if compiled.name == "mean_kernel":
        return []  # It reads 64 x 16 numbers whatever the size of its problem.
    found = []
    for offset, _, shape, kind in re.findall(pattern, compiled.asm["ttir"]):
        numbers = [int(size) for size in shape.split("x")] if shape else []
        small = len(numbers) == 1 and numbers[0] <= _TABLE_SIZE and _is_range(compiled, offset)
        small = small or _is_constant(compiled, offset)
        if not re.search(r"i64", kind) and not small and not _is_look_up(compiled, offset):
            found.append(f"{offset} : {kind}")
    return found


def _definition(compiled: Compiled, value: str) -> str:
    found = re.search(rf"^\s+{re.escape(value)} = (.*)$", compiled.asm["ttir"], re.MULTILINE)
    return found[1] if found else ""


def _is_range(compiled: Compiled, value: str) -> bool:
    """All of a table, from its beginning."""
    return _definition(compiled, value).startswith("tt.make_range")


def _is_constant(compiled: Compiled, value: str) -> bool:
    """A column of a row, whatever the row."""
    return _definition(compiled, value).startswith("arith.constant")


def _is_look_up(compiled: Compiled, value: str) -> bool:
    """A byte: a code of a table of 256."""
    definition = _definition(compiled, value)
    return "arith.extui" in definition and "xi8>" in definition
