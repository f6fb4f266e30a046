"""What in a kernel is data, and which of its blocks become straight lines: see `skeleton`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .flow import Flow, reachable
from .ptx import REGISTER, Instruction, Kernel, SkeletonError, registers

_SYMBOL = re.compile(r"(?<![%\w$])[A-Za-z_][\w$]*")

_MEMORY_ORDERS = ("volatile", "relaxed", "acquire", "release", "weak", "mmio")

NULL = "null"

Objects = Mapping[tuple[int, int], str]
"""Names of a kernel's pointers, `NULL` for those that are null in the launch, by the parameter and
the offset in it that they are at."""


@dataclass(frozen=True, slots=True)
class Region:
    """Blocks that become a straight line, between ``entry``, if there is one, and ``join``."""

    entry: int | None
    blocks: frozenset[int]
    join: int


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
        """Pointers that an instruction takes the last four bits of, if that is what it does.

        Or of a sum of one and what is the same in a block, such as where the block's rows begin.
        """
        if instruction.words[0] != "and" or instruction.operands[-1] != "15":
            return frozenset()

        def walk(register: str) -> frozenset[str]:
            makers = self.assignments.get(register, ())
            if len(makers) == 1 and makers[0].words[0] in ("or", "selp"):
                sides = [walk(operand) for operand in makers[0].operands[1:3]]
                return sides[0] | sides[1] if all(sides) else frozenset()
            # Several, where a branch says which parameter it is, or whether something is added.
            found: frozenset[str] = frozenset()
            for maker in makers:
                if "param" in maker.words:
                    found |= {self.objects.get(self._parameter(maker.operands[1]), "")}
                elif maker.words[0] == "add" and self._is_of_block(maker.operands[2]):
                    base = maker.operands[1]
                    found |= walk(base) if base != register else frozenset()
                else:
                    return frozenset()
            return found - {""}

        return walk(instruction.operands[1])

    def _is_of_block(self, operand: str) -> bool:
        """Whether a number is the same for all threads of a block, and no data."""
        names = _closure(REGISTER.findall(operand), self.assignments)
        makers = (maker for name in names for maker in self.assignments.get(name, ()))
        return not names & self.data and not any("%tid" in str(maker) for maker in makers)

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
        return any(registers(instruction.addresses) & self.data for instruction in body)

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
        names = _closure(REGISTER.findall(address), self.assignments)
        texts = [REGISTER.sub("", address)]
        found = set()
        for instruction in (i for name in names for i in self.assignments.get(name, ())):
            if "param" in instruction.words:
                found.add(self.objects.get(self._parameter(instruction.operands[1]), ""))
            elif not instruction.yields_data:
                texts += instruction.operands[1:]
        for text in texts:
            found |= self.kernel.objects & set(_SYMBOL.findall(text))
        return found - {""}


def analyse(kernel: Kernel, objects: Objects) -> Analysis:
    """Raises `SkeletonError` where a barrier or a wait depends on data."""
    blocks = kernel.blocks
    flow = Flow(blocks)
    live = reachable(blocks, [0], None)
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
