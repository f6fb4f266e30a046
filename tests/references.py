"""Whether compiled functions keep what they are given alive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from torch import Tensor


def assert_none_kept(run: Callable[[], object], values: Iterable[object]) -> None:
    """Run ``run`` often: as many references to each tensor and tuple of ``values`` are left."""
    # Not to numbers: the counts themselves are such.
    held = [value for value in values if isinstance(value, Tensor | tuple)]

    def counts() -> list[int]:
        return [sys.getrefcount(value) for value in held]

    run()
    before = counts()
    for _ in range(100):
        run()
    assert counts() == before


def assert_not_held(make: Callable[[], object]) -> None:
    """Who asks for the result of ``make`` has the only reference to it."""
    count = sys.getrefcount(make())
    assert count == 1
