"""PTX of one kernel, as nvcc writes it: its statements and blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


class SkeletonError(RuntimeError):
    """PTX of which no skeleton can be made."""


REGISTER = re.compile(r"%(?:p|r|rd|rs|f|fd|skeleton)\d+\b")

COLLECTIVE = ("shfl", "vote", "match", "redux", "mma")
"""Operations that lanes do together in registers."""


def registers(texts: Iterable[str]) -> set[str]:
    return set(REGISTER.findall(" ".join(texts)))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One statement of PTX."""

    operation: str
    operands: tuple[str, ...]
    guard: str = ""
    """``%p1`` or ``!%p1``; empty where it is always executed."""

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.operation.split("."))

    @property
    def space(self) -> str:
        """``shared`` or ``global`` of a load, store or atomic operation; else empty."""
        if self.words[0] in ("ld", "st", "atom", "red", "ldmatrix"):
            return next((word for word in self.words if word in ("shared", "global")), "")
        return ""

    @property
    def is_generic(self) -> bool:
        """Whether it may access any memory."""
        spaces = {"shared", "global", "param", "local", "const"}
        return self.words[0] in ("ld", "ldu", "st", "atom", "red") and spaces.isdisjoint(self.words)

    @property
    def copies(self) -> bool:
        return self.operation.startswith("cp.async.c") and "commit" not in self.operation

    @property
    def orders(self) -> bool:
        """Whether it is a barrier, or a part of the bookkeeping of asynchronous copies."""
        if self.operation.startswith("fence.proxy"):  # other ways to the same memory: no threads
            return False
        return self.words[0] in ("bar", "barrier", "membar", "fence") or (
            self.operation.startswith("cp.async") and not self.copies
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(operand for operand in self.operands if operand.startswith("["))

    @property
    def assigned(self) -> frozenset[str]:
        if self.words[0] in ("st", "red", "bra", "bar", "ret", "cp", "membar", "fence", "wgmma"):
            return frozenset()
        return frozenset(REGISTER.findall(self.operands[0]))

    @property
    def used(self) -> frozenset[str]:
        operands = self.operands[1:] if self.assigned else self.operands
        return frozenset(REGISTER.findall(" ".join((*operands, self.guard))))

    @property
    def yields_data(self) -> bool:
        kind = self.words[0]
        return kind in ("atom", "shfl", "vote", "match", "redux", "mma", "ldmatrix", "wmma") or (
            kind in ("ld", "ldu") and "param" not in self.words
        )

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"\t{guard}{self.operation} {', '.join(self.operands)};".replace(" ;", ";")


@dataclass(slots=True)
class Block:
    """Instructions without a branch, and where they lead: two ways, one, or none (`ret`)."""

    label: str
    body: list[Instruction] = field(default_factory=list)
    condition: str = ""
    """The guard of the branch to ``ways[0]``; empty where there is one way only."""
    ways: tuple[int, ...] = ()


@dataclass(slots=True)
class Kernel:
    """A kernel's text before its code, its declarations and its blocks; the first is the entry."""

    head: str
    declarations: list[str]
    blocks: list[Block]
    shared: dict[str, int]
    """Sizes in bytes of the static shared objects."""
    objects: frozenset[str]
    """Names of everything declared in memory."""


def _statements(body: str) -> Iterator[str]:
    body = re.sub(r"//[^\n]*", "", body)
    for piece in re.split(r";|(?<=:)\s", body):
        # Braces at the start are those around inline assembly; others are vectors of registers.
        statement = piece.strip()
        while statement[:1] in ("{", "}"):
            statement = statement[1:].strip()
        if statement:
            yield statement


def _split(operands: str) -> tuple[str, ...]:
    found, depth, start = [], 0, 0
    for i, letter in enumerate(operands):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            found.append(operands[start:i].strip())
            start = i + 1
    return tuple(part for part in (*found, operands[start:].strip()) if part)


def parse(text: str) -> Kernel:
    """PTX with one entry, as nvcc writes it."""
    entry = text.index(".entry")
    brace = text.index("\n{", entry) + 2
    head, body = text[:brace], text[brace : text.rindex("}")]
    declarations: list[str] = []
    lines: list[str | Instruction] = []
    for statement in _statements(body):
        if statement.startswith("."):
            # Without its braces, a register of theirs (nvcc's `tmp`) is one for all of them.
            if statement not in declarations:
                declarations.append(statement)
        elif statement.endswith(":"):
            lines.append(statement[:-1])
        else:
            found = re.match(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)$", statement, re.DOTALL)
            assert found is not None
            guard, operation, operands = found.groups()
            lines.append(Instruction(operation, _split(operands), guard or ""))
    shared, objects = {}, set()
    for declaration in (*declarations, *re.findall(r"(?m)^\.[^;=\n]*", head)):
        if found := re.match(r"\.(?:extern |shared|global).*?\s([\w$]+)\[(\d*)\]", declaration):
            objects.add(found[1])
            if found[2] and ".shared" in declaration:
                shared[found[1]] = int(found[2])
    return Kernel(head, declarations, _blocks(lines), shared, frozenset(objects))


def _blocks(lines: list[str | Instruction]) -> list[Block]:
    blocks = [Block("$entry")]
    ends: list[Instruction | None] = [None]
    for line in lines:
        if isinstance(line, str):
            blocks.append(Block(line))
            ends.append(None)
        elif line.words[0] in ("bra", "ret", "exit"):
            if line.words[0] != "bra" and line.guard:
                raise SkeletonError(f"a return under a condition: {line}")
            ends[-1] = line
            blocks.append(Block(f"$after_{len(blocks)}"))
            ends.append(None)
        else:
            blocks[-1].body.append(line)
    places = {block.label: i for i, block in enumerate(blocks)}
    for i, (block, end) in enumerate(zip(blocks, ends, strict=True)):
        following = (i + 1,) if i + 1 < len(blocks) else ()
        if end is None:
            block.ways = following
        elif end.words[0] == "bra":
            block.condition = end.guard
            block.ways = (places[end.operands[0]], *(following if end.guard else ()))
    return blocks
