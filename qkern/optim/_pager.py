"""Pager: what the optimizer asks of whatever keeps moments outside fast memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch

from qkern.optim._chunks import ChunkUpdate, MomentSpec
from qkern.optim._moments import Moments

MOST_STEPS = 1 << 53
"""That a parameter may have had: counters are floats in a checkpoint."""


class Pager(Protocol):
    """Keeps the moments of parameters, which it knows by their numbers from 0.

    The moments it takes and gives are flat, or of any shape where that is said.
    """

    takes_new_groups: bool
    """Whether `add` may be called once more."""
    waits_for_found_inf: bool
    """Whether a step is to begin only once gradients are known to be finite."""

    @property
    def steps(self) -> Sequence[int]:
        """How many steps each parameter has had, if the pager keeps that too; else empty.

        The same object until that changes.
        """

    @property
    def version(self) -> int:
        """Number of what the pager has committed; always 0 where it commits nothing."""

    @property
    def held_bytes(self) -> int:
        """Bytes of moments that are in fast memory now."""

    @property
    def report(self) -> dict[str, str]:
        """For each GPU, what its moments are in and why."""

    def add(self, first: int, params: Sequence[MomentSpec]) -> None:
        """Take in parameters of the numbers ``first`` and up, with moments of zero.

        What had these numbers goes: an optimizer may have failed to take the parameters in.

        Raises ``ValueError`` for a parameter on a device that the pager does not serve.
        """

    def device_of_steps(self, device: torch.device) -> torch.device:
        """Where the step counters are of parameters on ``device``."""

    def step(
        self, params: Collection[int], update: ChunkUpdate, finish: Callable[[], object]
    ) -> None:
        """Call ``update`` for every chunk with a piece of ``params``, which take one step by it.

        ``finish`` is called once all have, before the step is committed.

        Raises ``RuntimeError`` from whatever went wrong after the first chunk; an interrupt stays
        one, with the same text. Where `version` has changed, the step is whole all the same.
        """

    def read(self, bits: Mapping[int, int]) -> dict[int, Moments]:
        """Copies on the CPU of the moments of some parameters, each in the bits given for it.

        Moments of 8 bits may be asked for in 32 (see `Moments.to_reversible`), others as they are.
        """

    def load(self, moments: Mapping[int, tuple[int, Moments]]) -> None:
        """Replace everything by the steps and moments given, of any shape.

        Parameters left out have none: step 0 and zeros. After an exception everything is as before
        unless `version` has changed; where there are no versions, it is to be loaded again.
        """

    def close(self) -> None:
        """Free the memory. What is in a file stays there."""
