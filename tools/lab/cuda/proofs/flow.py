"""Which of a kernel's blocks come before, after and around which."""

from __future__ import annotations

from collections.abc import Iterable

from lab.cuda import graphs

from .ptx import Block


def reachable(blocks: list[Block], start: Iterable[int], stop: int | None) -> set[int]:
    found, todo = set(), list(start)
    while todo:
        block = todo.pop()
        if block != stop and block not in found:
            found.add(block)
            todo += blocks[block].ways
    return found


def reverse_postorder(blocks: list[Block]) -> dict[int, int]:
    """Places of the blocks that are reached, such that only loops lead back."""
    order = graphs.reverse_postorder([0], lambda block: blocks[block].ways)
    return {block: place for place, block in enumerate(order)}


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


class Flow:
    """Of a kernel's blocks: what dominates, what comes after on every way, and the loops."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.end = len(blocks)
        live = reachable(blocks, [0], None)
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
        return frozenset(reachable(self.blocks, starts, None if join == self.end else join))
