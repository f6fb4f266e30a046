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
5.  A load of matrices becomes a lane's load of the row that it names: the same 16 bytes.
6.  The same access, repeated in a straight line, is made once.
7.  Whether a tensor is aligned is decided for all blocks alike, also where each asks it of the
    place in it at which its rows begin: kernels ask that only of rows that are multiples of 16
    bytes, or make nothing of the answer.

So a proof of the skeleton is a proof of the kernel, provided that accesses stay within the objects
that they start from: AddressSanitizer looks at that, on the emulator. Anything that does not fit
is a `SkeletonError`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import replace

from .analysis import NULL, Analysis, Objects, analyse
from .flow import reverse_postorder
from .ptx import COLLECTIVE, Block, Instruction, SkeletonError, parse, registers


def _zero(register: str) -> str:
    kind = register.strip("%0123456789")
    if kind == "p":
        return f"\tsetp.ne.u32 {register}, 0, 0;"
    width = {"rs": 16, "r": 32, "f": 32, "rd": 64, "fd": 64, "skeleton": 32}[kind]
    return f"\tmov.b{width} {register}, 0;"


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
        if instruction.words[0] == "ldmatrix":
            if "x4" not in instruction.words:
                raise SkeletonError(f"{str(instruction).strip()}: some lanes read nothing")
            instruction = replace(instruction, operation="ld.shared.v4.u32")
        if instruction.space == "shared" and self._objects(instruction) & self.atomic:
            instruction = _exchanged(instruction)
        if instruction.guard.lstrip("!") in data:
            instruction = replace(instruction, guard="")
        if not registers(instruction.addresses) & data:
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
            elif instruction.words[0] in COLLECTIVE:
                # Lanes meet, and no memory is touched. Straight lines lost the lanes' condition.
                if instruction.words[0] != "mma" and not straight:
                    yield instruction
            elif instruction.orders or instruction.copies:
                if registers((*instruction.operands, instruction.guard)) & data:
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
    order = reverse_postorder(blocks)
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
        todo += registers([block.condition])
        for instruction in block.body:
            for register in instruction.assigned:
                makers.setdefault(register, []).append(instruction)
            if instruction.space:
                todo += registers((*instruction.addresses, instruction.guard))
            elif instruction.orders or instruction.copies:
                todo += registers((*instruction.operands, instruction.guard))
            elif instruction.words[0] in COLLECTIVE:
                todo += registers((*instruction.operands[2:], instruction.guard))
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
    order = reverse_postorder(blocks)
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
            if a.space or a.copies or a.orders or a.words[0] in COLLECTIVE or a.assigned & needed
        ]
        kept = [b for a in kept for b in (_inserted_bits(a) if a.words[0] == "bfi" else (a,))]
        for instruction in _once(kept):
            assigned |= instruction.assigned
            used |= instruction.used
            lines.append(str(instruction))
        if block.condition:
            used |= registers([block.condition])
            lines.append(f"\t@{block.condition} bra {blocks[block.ways[0]].label};")
        lines.append(f"\tbra {blocks[block.ways[-1]].label};" if block.ways else "\tret;")
    # Data that are stored or exchanged, whose values do not matter.
    zeros = [_zero(register) for register in sorted(used - assigned)]
    declarations = [f"\t{declaration};" for declaration in kernel.declarations]
    return "\n".join(
        (kernel.head, *declarations, "\t.reg .b32 %skeleton<4>;", *zeros, *lines, "}\n")
    )
