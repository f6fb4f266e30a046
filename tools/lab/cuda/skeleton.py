"""Reduces a kernel's PTX to what a proof of race-freedom is about: addresses, barriers, control.

Whether a kernel races does not depend on the values that it computes, only on which addresses each
thread reads and writes between which barriers. `skeleton` keeps those accesses, every barrier,
every asynchronous copy and its waits, and what their addresses and the branches are computed from;
arithmetic on data (mma, conversions, products) goes. What is left makes at least the accesses
that the kernel makes, whatever the data:

1.  A value is *data* if it was loaded from memory or came from another lane, if it was computed
    from such a value, or if which of several assignments gave it depends on such a value.
2.  A region entered or left by a branch on data becomes one straight line of all its accesses. It
    may contain no barrier and no wait. So does, to keep proofs short, a loop with an access to
    shared memory whose address is data, if it stores nothing to global memory.
    Accesses through pointers that are null in the launch, which no thread comes to, are left out.
3.  An access in such a line whose address is data, or counted by a loop that is gone, becomes
    accesses to every byte of the shared object that it lies in. In global memory it must be a load
    from a tensor that the kernel never writes, which cannot race: it goes.
4.  Atomic operations do not race with each other, but with all else. On a shared object that has
    any, they become loads, and its loads become stores, which may be seen to race where loads
    would not.
5.  The same access, repeated in a straight line, is made once.

So a proof of the skeleton is a proof of the kernel, provided that accesses stay within the objects
that they start from: AddressSanitizer looks at that, on the emulator. Anything that does not fit
is a `SkeletonError`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace


class SkeletonError(RuntimeError):
    """PTX of which no skeleton can be made."""


_REGISTER = re.compile(r"%(?:p|r|rd|rs|f|fd|skeleton)\d+\b")
_SYMBOL = re.compile(r"(?<![%\w$])[A-Za-z_][\w$]*")
_MEMORY_ORDERS = ("volatile", "relaxed", "acquire", "release", "weak", "mmio")
_COLLECTIVE = ("shfl", "vote", "match", "redux", "mma")
"""Operations that lanes do together in registers."""


def _registers(texts: Iterable[str]) -> set[str]:
    return set(_REGISTER.findall(" ".join(texts)))


def _zero(register: str) -> str:
    kind = register.strip("%0123456789")
    if kind == "p":
        return f"\tsetp.ne.u32 {register}, 0, 0;"
    width = {"rs": 16, "r": 32, "f": 32, "rd": 64, "fd": 64, "skeleton": 32}[kind]
    return f"\tmov.b{width} {register}, 0;"


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
        if self.words[0] in ("ld", "st", "atom", "red"):
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
        return self.words[0] in ("bar", "barrier", "membar", "fence") or (
            self.operation.startswith("cp.async") and not self.copies
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(operand for operand in self.operands if operand.startswith("["))

    @property
    def assigned(self) -> frozenset[str]:
        if self.words[0] in ("st", "red", "bra", "bar", "ret", "cp", "membar", "fence"):
            return frozenset()
        return frozenset(_REGISTER.findall(self.operands[0]))

    @property
    def used(self) -> frozenset[str]:
        operands = self.operands[1:] if self.assigned else self.operands
        return frozenset(_REGISTER.findall(" ".join((*operands, self.guard))))

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


@dataclass(frozen=True, slots=True)
class Region:
    """Blocks that become a straight line, between ``entry``, if there is one, and ``join``."""

    entry: int | None
    blocks: frozenset[int]
    join: int


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


def _reachable(blocks: list[Block], start: Iterable[int], stop: int | None) -> set[int]:
    found, todo = set(), list(start)
    while todo:
        block = todo.pop()
        if block != stop and block not in found:
            found.add(block)
            todo += blocks[block].ways
    return found


def _reverse_postorder(blocks: list[Block]) -> dict[int, int]:
    """Places of the blocks that are reached, such that only loops lead back."""
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].ways))]
    while stack:
        block, ways = stack[-1]
        for way in ways:
            if way not in seen:
                seen.add(way)
                stack.append((way, iter(blocks[way].ways)))
                break
        else:
            done.append(block)
            stack.pop()
    return {block: place for place, block in enumerate(reversed(done))}


def _dominators(count: int, root: int, before: list[list[int]]) -> list[set[int]]:
    everything = set(range(count))
    found = [{root} if block == root else everything for block in range(count)]
    changed = True
    while changed:
        changed = False
        for block in range(count):
            if block == root:
                continue
            sets = [found[one] for one in before[block]]
            now = set.intersection(*sets) | {block} if sets else everything
            if now != found[block]:
                found[block], changed = now, True
    return found


class _Flow:
    """Of a kernel's blocks: what dominates, what comes after on every way, and the loops."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.end = len(blocks)
        live = _reachable(blocks, [0], None)
        before: list[list[int]] = [[] for _ in blocks]
        after: list[list[int]] = [list(block.ways) or [self.end] for block in blocks] + [[]]
        for i in live:
            for way in blocks[i].ways:
                before[way].append(i)
        self.dominators = _dominators(len(blocks), 0, before)
        self.postdominators = _dominators(len(blocks) + 1, self.end, after)
        self.loops: dict[int, set[int]] = {}
        for i in live:
            for header in blocks[i].ways:
                if header in self.dominators[i]:
                    loop, todo = {header}, [i]
                    while todo:
                        one = todo.pop()
                        if one not in loop:
                            loop.add(one)
                            todo += before[one]
                    self.loops.setdefault(header, set()).update(loop)

    def join(self, block: int, outside: set[int]) -> int:
        """The first block, not among ``outside``, that every way from ``block`` meets."""
        later = self.postdominators[block] - {block} - outside
        return max(later, key=lambda one: len(self.postdominators[one]))

    def region(self, starts: Iterable[int], join: int) -> frozenset[int]:
        return frozenset(_reachable(self.blocks, starts, None if join == self.end else join))


def _closure(names: Iterable[str], assignments: dict[str, list[Instruction]]) -> set[str]:
    """Registers that those named are computed from, not through memory or other lanes."""
    found, todo = set(), list(names)
    while todo:
        register = todo.pop()
        if register not in found:
            found.add(register)
            for instruction in assignments.get(register, ()):
                if not instruction.yields_data:
                    todo += instruction.used
    return found


NULL = "null"
Objects = Mapping[tuple[int, int], str]
"""Names of a kernel's pointers, `NULL` for those that are null in the launch, by the parameter and
the offset in it that they are at."""


@dataclass(slots=True)
class Analysis:
    """What is data in a kernel, and the regions that become straight lines."""

    kernel: Kernel
    objects: Objects
    assignments: dict[str, list[Instruction]]
    data: set[str] = field(default_factory=set)
    regions: list[Region] = field(default_factory=list)

    def _parameter(self, address: str) -> tuple[int, int]:
        """The parameter, and the offset in it, that ``[address]`` of a ``ld.param`` is at."""
        base, _, offset = address.strip("[]").partition("+")
        at = int(offset or 0)
        while base.startswith("%"):
            (maker,) = self.assignments[base]
            if maker.words[0] == "add":
                at += int(maker.operands[2], 0)
            elif maker.words[0] not in ("mov", "cvta"):
                raise SkeletonError(f"{maker}: the address of a parameter")
            base = maker.operands[1]
        return int(base.rpartition("_param_")[2]), at

    def tested(self, instruction: Instruction) -> frozenset[str]:
        """Pointers that an instruction takes the last four bits of, if that is what it does."""
        if instruction.words[0] != "and" or instruction.operands[-1] != "15":
            return frozenset()

        def walk(register: str) -> frozenset[str]:
            makers = self.assignments.get(register, ())
            if len(makers) == 1 and makers[0].words[0] in ("or", "selp"):
                sides = [walk(operand) for operand in makers[0].operands[1:3]]
                return sides[0] | sides[1] if all(sides) else frozenset()
            # Several, where a branch says which parameter it is.
            if not all("param" in maker.words for maker in makers):
                return frozenset()
            names = (self.objects.get(self._parameter(maker.operands[1])) for maker in makers)
            return frozenset(name for name in names if name)

        return walk(instruction.operands[1])

    def in_global(self, instruction: Instruction) -> Instruction:
        """With its space, where a generic access is to what pointers in parameters point to."""
        objects = self.objects_of(instruction.addresses[0])
        kind, *rest = instruction.words
        if not objects or objects & self.kernel.shared.keys() or rest[0] in _MEMORY_ORDERS:
            return instruction
        return replace(instruction, operation=".".join((kind, "global", *rest)))

    def has_data_addresses(self, blocks: Iterable[int]) -> bool:
        """Whether blocks access shared memory where data say."""
        body = (a for i in blocks for a in self.kernel.blocks[i].body if a.space == "shared")
        return any(_registers(instruction.addresses) & self.data for instruction in body)

    def can_be_straight(self, region: Region) -> bool:
        """Whether a loop's accesses may be replaced where they depend on its counter."""
        body = [a for i in region.blocks for a in self.kernel.blocks[i].body]
        return not any(
            instruction.orders
            or instruction.copies
            or (instruction.space == "global" and instruction.words[0] != "ld")
            or (
                instruction.space == "shared"
                and not self.objects_of(instruction.addresses[0]) <= self.kernel.shared.keys()
            )
            for instruction in body
        )

    def objects_of(self, address: str) -> set[str]:
        """The tensors and shared objects that an address is computed from."""
        names = _closure(_REGISTER.findall(address), self.assignments)
        texts = [_REGISTER.sub("", address)]
        found = set()
        for instruction in (i for name in names for i in self.assignments.get(name, ())):
            if "param" in instruction.words:
                found.add(self.objects.get(self._parameter(instruction.operands[1]), ""))
            elif not instruction.yields_data:
                texts += instruction.operands[1:]
        for text in texts:
            found |= self.kernel.objects & set(_SYMBOL.findall(text))
        return found - {""}


def _assigned_in(blocks: list[Block], region: Iterable[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for block in region:
        for instruction in blocks[block].body:
            for register in instruction.assigned:
                counts[register] = counts.get(register, 0) + 1
    return counts


def analyse(kernel: Kernel, objects: Objects) -> Analysis:
    """Raises `SkeletonError` where a barrier or a wait depends on data."""
    blocks = kernel.blocks
    flow = _Flow(blocks)
    live = _reachable(blocks, [0], None)
    analysis = Analysis(kernel, objects, {})
    data, assignments = analysis.data, analysis.assignments
    for i in live:
        for instruction in blocks[i].body:
            for register in instruction.assigned:
                assignments.setdefault(register, []).append(instruction)
    for i in live:
        body = blocks[i].body
        body[:] = [analysis.in_global(a) if a.is_generic else a for a in body]
    regions: dict[tuple[str, int], Region] = {}
    size = -1
    while len(data) + len(regions) != size:
        size = len(data) + len(regions)
        for register, makers in assignments.items():
            if any(maker.yields_data or maker.used & data for maker in makers):
                data.add(register)
        for i in live:
            if blocks[i].condition.lstrip("!") in data:
                join = flow.join(i, set())
                regions["branch", i] = Region(i, flow.region(blocks[i].ways, join), join)
        for header, loop in flow.loops.items():
            if analysis.has_data_addresses(loop):
                join = flow.join(header, loop)
                region = Region(None, flow.region([header], join), join)
                if analysis.can_be_straight(region):
                    regions["loop", header] = region
        for region in regions.values():
            assigned = [r for i in region.blocks for a in blocks[i].body for r in a.assigned]
            data.update(register for register in assigned if len(assignments[register]) > 1)
    for region in regions.values():
        for instruction in (a for i in region.blocks for a in blocks[i].body):
            if instruction.orders or instruction.copies:
                raise SkeletonError(f"{str(instruction).strip()} under a branch on data")
    for region in sorted(regions.values(), key=lambda one: -len(one.blocks)):
        for other in analysis.regions:
            inside = (None, other.entry, *other.blocks)
            if region.blocks <= other.blocks and region.entry in inside:
                break
            if region.blocks & other.blocks:
                raise SkeletonError("branches on data whose regions overlap")
        else:
            analysis.regions.append(region)
    return analysis


def _every_byte(instruction: Instruction, symbol: str, size: int) -> Iterator[Instruction]:
    """The access, a load or a store, made to all of an object: 16 bytes at a time."""
    kind = "st" if instruction.words[0] == "st" else "ld"
    for offset in range(0, size, 16):
        address = f"[{symbol}+{offset}]"
        if offset + 16 <= size:
            vector = "{" + ", ".join(f"%skeleton{i}" for i in range(4)) + "}"
            operands = (vector, address) if kind == "ld" else (address, vector)
            yield Instruction(f"{kind}.shared.v4.u32", operands)
        else:
            for byte in range(offset, size):
                address = f"[{symbol}+{byte}]"
                operands = ("%skeleton0", address) if kind == "ld" else (address, "%skeleton0")
                yield Instruction(f"{kind}.shared.u8", operands)


def _exchanged(instruction: Instruction) -> Instruction:
    """An atomic operation as a load, a load as a store; a store as it is."""
    kind, width = instruction.words[0], int(instruction.words[-1][1:])
    vector = [word for word in instruction.words if word in ("v2", "v4")]
    if kind == "st":
        return instruction
    if kind == "ld":
        words, operands = ("st", "shared", *vector), instruction.operands[::-1]
    else:
        words, operands = ("ld", "shared"), instruction.operands[:2]
    return Instruction(".".join((*words, f"u{width}")), operands, instruction.guard)


class _Writer:
    """Makes the skeleton's instructions of a kernel's."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.written: set[str] = set()
        self.atomic: set[str] = set()
        for instruction in (a for block in analysis.kernel.blocks for a in block.body):
            if instruction.space == "global" and instruction.words[0] != "ld":
                self.written |= self._objects(instruction) - {NULL}
            if instruction.words[0] in ("atom", "red"):
                self.atomic |= self._objects(instruction)

    def _objects(self, instruction: Instruction) -> set[str]:
        found = self.analysis.objects_of(instruction.addresses[0])
        if not found:
            raise SkeletonError(f"{str(instruction).strip()}: in no known object")
        return found

    def _access(self, instruction: Instruction, straight: bool) -> Iterator[Instruction]:
        data = self.analysis.data
        if instruction.space == "shared" and self._objects(instruction) & self.atomic:
            instruction = _exchanged(instruction)
        if instruction.guard.lstrip("!") in data:
            instruction = replace(instruction, guard="")
        if not _registers(instruction.addresses) & data:
            # A straight line has lost the conditions, and with them the tests for null.
            if not straight or self._objects(instruction) != {NULL}:
                yield instruction
            return
        objects = self._objects(instruction)
        shared = self.analysis.kernel.shared
        said = f"{str(instruction).strip()}: an address that is data, in {', '.join(objects)}"
        if instruction.space == "global":
            if instruction.words[0] != "ld" or objects & self.written:
                raise SkeletonError(said)
        elif len(objects) == 1 and objects <= shared.keys():
            (symbol,) = objects
            yield from _every_byte(instruction, symbol, shared[symbol])
        else:
            raise SkeletonError(said)

    def body(self, block: Block, *, straight: bool) -> Iterator[Instruction]:
        """What is left of a block, in a straight line or not."""
        data = self.analysis.data
        for instruction in block.body:
            if instruction.space:
                yield from self._access(instruction, straight)
            elif instruction.is_generic:
                raise SkeletonError(f"{str(instruction).strip()}: in an unknown space")
            elif instruction.words[0] in _COLLECTIVE:
                # Lanes meet, and no memory is touched. Straight lines lost the lanes' condition.
                if instruction.words[0] != "mma" and not straight:
                    yield instruction
            elif instruction.orders or instruction.copies:
                if _registers((*instruction.operands, instruction.guard)) & data:
                    raise SkeletonError(f"{str(instruction).strip()} depends on data")
                yield instruction
            elif not instruction.assigned & data:
                yield instruction


def _once(body: list[Instruction]) -> list[Instruction]:
    """Without accesses that the same thread has just made, and nothing ordered in between."""
    found, seen = [], set()
    for instruction in body:
        if instruction.orders or instruction.copies:
            seen.clear()
        elif instruction.space:
            key = (instruction.operation, instruction.addresses, instruction.guard)
            if key in seen:
                continue
            seen.add(key)
        for register in instruction.assigned:
            seen = {key for key in seen if register not in " ".join((*key[1], key[2]))}
        found.append(instruction)
    return found


def _straighten(analysis: Analysis, writer: _Writer) -> list[Block]:
    """The blocks, each region as one."""
    blocks = analysis.kernel.blocks
    order = _reverse_postorder(blocks)
    found = [
        Block(block.label, list(writer.body(block, straight=False)), block.condition, block.ways)
        if i in order
        else Block(block.label)
        for i, block in enumerate(blocks)
    ]
    for number, region in enumerate(analysis.regions):
        line = Block(f"$line_{number}")
        line.ways = () if region.join == len(blocks) else (region.join,)
        for i in sorted(region.blocks & order.keys(), key=order.__getitem__):
            line.body += writer.body(blocks[i], straight=True)
        place = len(found)
        found.append(line)
        if region.entry is not None and region.entry not in region.blocks:
            found[region.entry].condition, found[region.entry].ways = "", (place,)
        for i, block in enumerate(found[:place]):
            if i not in region.blocks:
                block.ways = tuple(place if way in region.blocks else way for way in block.ways)
    return found


def _inserted_bits(instruction: Instruction) -> Iterator[Instruction]:
    """``bfi``, whose result sentryward takes for an unknown, as shifts and masks."""
    result, bits, base, position, length = instruction.operands
    mask = (1 << int(length)) - 1 << int(position)
    first, second = "%skeleton0", "%skeleton1"
    yield Instruction("shl.b32", (first, bits, position))
    yield Instruction("and.b32", (first, first, str(mask)))
    yield Instruction("and.b32", (second, base, str(0xFFFFFFFF ^ mask)))
    yield Instruction("or.b32", (result, first, second))


def _needed(blocks: list[Block], live: Iterable[int]) -> set[str]:
    """Registers that addresses, conditions and barriers are computed from."""
    needed: set[str] = set()
    makers: dict[str, list[Instruction]] = {}
    todo: list[str] = []
    for block in (blocks[i] for i in live):
        todo += _registers([block.condition])
        for instruction in block.body:
            for register in instruction.assigned:
                makers.setdefault(register, []).append(instruction)
            if instruction.space:
                todo += _registers((*instruction.addresses, instruction.guard))
            elif instruction.orders or instruction.copies:
                todo += _registers((*instruction.operands, instruction.guard))
            elif instruction.words[0] in _COLLECTIVE:
                todo += _registers((*instruction.operands[2:], instruction.guard))
    while todo:
        register = todo.pop()
        if register not in needed:
            needed.add(register)
            for instruction in makers.get(register, ()):
                todo += instruction.used
    return needed


def tested_for_alignment(text: str, objects: Objects) -> set[frozenset[str]]:
    """Of which tensors together the kernel asks whether they are 16-aligned."""
    kernel = parse(text)
    analysis = analyse(kernel, objects)
    tests = (analysis.tested(i) for block in kernel.blocks for i in block.body)
    return {test - {NULL} for test in tests} - {frozenset()}


def skeleton(text: str, objects: Objects, misaligned: Container[str] = ()) -> str:
    """The skeleton of PTX with one kernel.

    ``objects`` are its parameters that are pointers. Those ``misaligned`` are not 16-aligned, the
    others are: the kernel's tests are decided.
    """
    kernel = parse(text)
    analysis = analyse(kernel, objects)
    for block in kernel.blocks:
        for i, instruction in enumerate(block.body):
            if tested := analysis.tested(instruction):
                bits = "8" if any(name in misaligned for name in tested) else "0"
                block.body[i] = Instruction(
                    f"mov.{instruction.words[-1]}", (instruction.operands[0], bits)
                )
    blocks = _straighten(analysis, _Writer(analysis))
    order = _reverse_postorder(blocks)
    needed = _needed(blocks, order)
    lines = []
    assigned: set[str] = set()
    used: set[str] = set()
    for i in sorted(order, key=order.__getitem__):
        block = blocks[i]
        lines.append(f"{block.label}:")
        kept = [
            a
            for a in block.body
            if a.space or a.copies or a.orders or a.words[0] in _COLLECTIVE or a.assigned & needed
        ]
        kept = [b for a in kept for b in (_inserted_bits(a) if a.words[0] == "bfi" else (a,))]
        for instruction in _once(kept):
            assigned |= instruction.assigned
            used |= instruction.used
            lines.append(str(instruction))
        if block.condition:
            used |= _registers([block.condition])
            lines.append(f"\t@{block.condition} bra {blocks[block.ways[0]].label};")
        lines.append(f"\tbra {blocks[block.ways[-1]].label};" if block.ways else "\tret;")
    # Data that are stored or exchanged, whose values do not matter.
    zeros = [_zero(register) for register in sorted(used - assigned)]
    declarations = [f"\t{declaration};" for declaration in kernel.declarations]
    return "\n".join(
        (kernel.head, *declarations, "\t.reg .b32 %skeleton<4>;", *zeros, *lines, "}\n")
    )
