"""Machine code as `cuobjdump -sass` prints it: instructions, control flow, loops, main paths.

Every instruction carries the compiler's schedule; its field for the cycles until the next one may
issue is known for sm_80 to sm_90 (`STALLS_KNOWN`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from lab.cuda import graphs

STALLS_KNOWN = (80, 86, 89, 90)

PRODUCTS = ("HMMA", "HGMMA")
"""Of tensor cores: a warp's, and of four warps with an operand in shared memory."""

_ALU = (
    *("PRMT", "LOP3", "PLOP3", "SHF", "SHL", "SHR", "BMSK", "SGXT", "P2R", "R2P", "F2FP"),
    *("LEA", "IADD3", "VIADD", "IABS", "IMNMX", "VIMNMX", "VIADDMNMX", "ISETP", "SEL"),
    *("FSETP", "FSEL", "FMNMX"),
)
"""Of integers, bits, bytes, comparisons and 16-bit roundings: 16 lanes a clock and quarter, half of
what is issued (CUDA Programming Guide, throughput of arithmetic instructions)."""

_MEMORY = ("LDG", "STG", "LDS", "STS", "LDGSTS")

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_FIRST = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/"
)
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_LANE_REGISTER = re.compile(r"\bR\d")
_ADDRESS = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str
    operands: str
    stall: int
    """Cycles until the next instruction may issue, at least 1."""

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """Width of a memory access, of each thread."""
        parts = self.opcode.split(".")
        for text, bits in (("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("16", 16)):
            if text in parts:
                return bits
        return 8 if "U8" in parts or "S8" in parts else 32

    @property
    def shared_wavefronts(self) -> int:
        """Passes over the banks of shared memory, by its width: 128 bytes each, no conflicts.

        One where the address is the same for all lanes.
        """
        if self.predicate == "!PT":  # never executed: it keeps others apart
            return 0
        if self.base == "LDS" and not _LANE_REGISTER.search(self.operands.partition("[")[2]):
            return 1
        if self.base == "LDSM":
            return int(self.opcode[-1]) if self.opcode[-2:] in (".2", ".4") else 1
        if self.base == "HGMMA":  # a warp's part of what the four read of the second operand
            return _hopper_shape(self)[1] // 16
        return max(self.bits // 32, 1) if self.base in ("LDS", "STS", "LDGSTS") else 0

    @property
    def target(self) -> int | None:
        found = _ADDRESS.findall(self.operands)
        return int(found[-1], 16) if found else None

    @property
    def is_wide(self) -> bool:
        """What only the main path of a kernel has: 128-bit accesses and tensor-core products."""
        return self.base in (*PRODUCTS, "LDSM") or (self.base in _MEMORY and self.bits == 128)


@dataclass(frozen=True, slots=True)
class Path:
    """The instructions that a thread on the main path runs in one round of a loop."""

    instructions: tuple[Instruction, ...]

    def count(self, base: str, bits: int | None = None) -> int:
        return sum(i.base == base and bits in (None, i.bits) for i in self.instructions)

    @property
    def cycles(self) -> int:
        """The compiler's own schedule: an estimate, without waits for memory or other warps."""
        return sum(i.stall for i in self.instructions)

    @property
    def multiply_adds(self) -> int:
        """Of the warp, on tensor cores."""
        return sum(_multiply_adds(i) for i in self.instructions if i.base in PRODUCTS)

    @property
    def alu(self) -> int:
        """Instructions of the unit that takes one every other clock."""
        return sum(i.base in _ALU for i in self.instructions)

    @property
    def shared_wavefronts(self) -> int:
        """Of the warp; a multiprocessor's shared memory takes one a cycle."""
        return sum(i.shared_wavefronts for i in self.instructions)

    @property
    def widths(self) -> Counter[str]:
        """Memory accesses as ``LDG.128: 4``."""
        return Counter(
            f"{i.base}.{i.bits}"
            for i in self.instructions
            if i.base in _MEMORY and i.predicate != "!PT"
        )


def _hopper_shape(instruction: Instruction) -> tuple[int, int, int]:
    """M, N and K of ``HGMMA.64x256x16...``."""
    rows, columns, depth = map(int, instruction.opcode.split(".")[1].split("x"))
    return rows, columns, depth


def _multiply_adds(instruction: Instruction) -> int:
    if instruction.base == "HGMMA":
        return math.prod(_hopper_shape(instruction)) // 4  # a warp's quarter
    for shape, product in (("16816", 16 * 8 * 16), ("1688", 16 * 8 * 8), ("884", 8 * 8 * 4)):
        if shape in instruction.opcode.split("."):
            return product
    raise ValueError(f"{instruction.opcode}: unknown shape")


@dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)


@dataclass
class Function:
    name: str
    instructions: list[Instruction]

    def count(self, base: str) -> int:
        return sum(i.base == base for i in self.instructions)

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """Basic blocks by their first address; where an indirect branch goes is not known."""
        code = self.instructions
        addresses = {i.address for i in code}
        leaders = {code[0].address}
        joins: dict[str, int] = {}
        for i, instruction in enumerate(code):
            if instruction.base in ("BRA", "BSSY") and instruction.target in addresses:
                leaders.add(instruction.target)
            if _ends_block(instruction) and i + 1 < len(code):
                leaders.add(code[i + 1].address)
        blocks: dict[int, Block] = {}
        for instruction in code:
            if instruction.address in leaders:
                current = blocks[instruction.address] = Block([])
            current.instructions.append(instruction)
        starts = sorted(blocks)
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            block = blocks[start]
            for instruction in block.instructions:
                if instruction.base == "BSSY" and instruction.target is not None:
                    joins[instruction.operands.partition(",")[0]] = instruction.target
            last = block.instructions[-1]
            always = last.predicate is None and "UP" not in last.operands
            if last.base == "BRA" and last.target in blocks:
                block.successors.append(last.target)
                # BRA.DIV and BRA.CONV are for warps that have diverged, or not.
                if always and not last.opcode.endswith((".DIV", ".CONV")):
                    continue
            elif last.base == "BSYNC" and joins.get(last.operands) in blocks:
                block.successors.append(joins[last.operands])
                if always:
                    continue
            elif last.base in ("EXIT", "RET", "BRX") and always:
                continue
            if following is not None:
                block.successors.append(following)
        return blocks

    @cached_property
    def loops(self) -> dict[int, frozenset[int]]:
        """Natural loops: header -> all of its blocks."""
        blocks = self.blocks
        # What only an indirect branch reaches has no known predecessor: it counts as an entry.
        reached: set[int] = set()
        roots = []
        for start in sorted(blocks):
            if start not in reached:
                roots.append(start)
                reached |= _reach(blocks, start)
        order = [-1, *_reverse_postorder(blocks, roots)]
        predecessors: dict[int, list[int]] = {start: [] for start in blocks}
        for start, block in blocks.items():
            for successor in block.successors:
                predecessors[successor].append(start)
        for root in roots:
            predecessors[root].append(-1)
        dominators = _dominators(order, predecessors)
        loops: dict[int, set[int]] = {}
        for start, block in blocks.items():
            for header in block.successors:
                if header in dominators[start]:
                    body = loops.setdefault(header, {header})
                    stack = [start]
                    while stack:
                        node = stack.pop()
                        if node not in body:
                            body.add(node)
                            stack.extend(p for p in predecessors[node] if p != -1)
        return {header: frozenset(body) for header, body in loops.items()}

    def main_path(self, header: int, rich_in: str = "LDG") -> Path:
        """A round of a loop by its main path.

        Of the ways from the header back to it, the one with most wide instructions, then with most
        loads of single bytes (double-quantised scales), then with most instructions ``rich_in``
        (of loads, which the map of those scales takes), then the shortest. A loop inside is gone
        through once.
        """
        body = self.loops[header]
        blocks = self.blocks
        # Blocks of the body in an order in which only back edges go backwards.
        order = [b for b in _reverse_postorder(blocks, [header], body) if b in body]
        position = {start: i for i, start in enumerate(order)}
        best: dict[int, tuple[tuple[int, int, int, int], int | None]] = {}
        for start in reversed(order):
            options = []
            for successor in blocks[start].successors:
                if successor == header:
                    options.append(((0, 0, 0, 0), None))
                elif position.get(successor, -1) > position[start] and successor in best:
                    options.append((best[successor][0], successor))
            if not options:
                continue
            code = blocks[start].instructions
            own = (
                sum(i.is_wide for i in code),
                sum(i.base == "LDG" and i.bits == 8 for i in code),
                sum(i.base == rich_in for i in code),
                -len(code),
            )
            score, following = max(options, key=lambda option: option[0])
            best[start] = (tuple(a + b for a, b in zip(own, score, strict=True)), following)  # type: ignore[assignment]
        code = []
        node: int | None = header
        while node is not None:
            code += blocks[node].instructions
            node = best[node][1]
        return Path(tuple(code))

    def hot_path(self, base: str, bits: int | None = None, rich_in: str = "LDG") -> Path | None:
        """The main path of the loop with most instructions ``base`` (of ``bits``).

        Of loops nested in one another the inner, of alternatives the one for double-quantised
        scales; None where no loop has such an instruction. ``rich_in`` as in `main_path`.
        """
        paths = {header: self.main_path(header, rich_in) for header in self.loops}
        most = max((path.count(base, bits) for path in paths.values()), default=0)
        if most == 0:
            return None
        hot = [h for h, path in paths.items() if 2 * path.count(base, bits) >= most]
        inner = [h for h in hot if not any(o != h and self.loops[o] < self.loops[h] for o in hot)]
        chosen = max(
            inner, key=lambda h: (paths[h].count("LDG", 8) > 0, paths[h].count(base, bits))
        )
        return paths[chosen]


def _ends_block(instruction: Instruction) -> bool:
    return instruction.base in ("BRA", "EXIT", "BSYNC", "RET", "BRX")


def _reach(blocks: dict[int, Block], start: int) -> set[int]:
    seen = {start}
    stack = [start]
    while stack:
        for successor in blocks[stack.pop()].successors:
            if successor not in seen:
                seen.add(successor)
                stack.append(successor)
    return seen


def _reverse_postorder(
    blocks: dict[int, Block], roots: Iterable[int], within: frozenset[int] | None = None
) -> list[int]:
    def ways(node: int) -> list[int]:
        return [s for s in blocks[node].successors if within is None or s in within]

    return graphs.reverse_postorder(roots, ways)


def _dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, set[int]]:
    everything = set(order)
    dominators = {node: {node} if node == order[0] else everything for node in order}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [dominators[p] for p in predecessors[node] if p in dominators]
            new = set.intersection(*known) | {node}
            if new != dominators[node]:
                dominators[node] = new
                changed = True
    return dominators


def parse(text: str) -> list[Function]:
    """The functions in the output of ``cuobjdump -sass``."""
    functions: list[Function] = []
    pending: re.Match[str] | None = None
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            functions.append(Function(found[1], []))
        elif found := _FIRST.match(line):
            pending = found
        elif pending is not None and (found := _SECOND.match(line)):
            functions[-1].instructions.append(_instruction(pending, int(found[1], 16)))
            pending = None
    return functions


def _instruction(line: re.Match[str], high_word: int) -> Instruction:
    address, predicate, opcode, operands = line.groups()
    stall = (high_word >> 41) & 0xF
    return Instruction(int(address, 16), predicate, opcode, operands, max(stall, 1))
