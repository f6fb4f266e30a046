"""Orders of the nodes of a graph of control flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def reverse_postorder(roots: Iterable[int], ways: Callable[[int], Iterable[int]]) -> list[int]:
    """The nodes that ``roots`` lead to, such that only loops lead back; ``ways`` are a node's."""
    seen: set[int] = set()
    finished: list[int] = []
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(ways(root)))]
        while stack:
            node, successors = stack[-1]
            for successor in successors:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(ways(successor))))
                    break
            else:
                finished.append(node)
                stack.pop()
    return finished[::-1]
