"""The orders in which a simulated GPU does the work of its streams, and budgets."""

from __future__ import annotations

from collections.abc import Callable

from lab.fake_gpu import FakeGpu

KIB = 1 << 10
BUDGET = 256 * KIB  # four chunks
Use = Callable[[FakeGpu], FakeGpu]
SCHEDULES = [(0.0, 0), (1.0, 0), (0.5, 1), (0.7, 2), (0.3, 3), (0.6, 4)]
