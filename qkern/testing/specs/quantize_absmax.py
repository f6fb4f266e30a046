"""quantize_absmax: scales to bytes, scales of those, and a mean."""

from __future__ import annotations

import torch

from qkern import formats
from qkern.testing._spec import Case, Inputs, OpSpec
from qkern.testing._values import HALFWAY_TAILS, place, scales


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    return place({"absmax": scales(case.numel, case.values, generator)}, case, device, "absmax")


def _cases() -> tuple[Case, ...]:
    sizes = (1, 2, 3, 255, 256, 257, 1000, 16_384, 70_001)
    cases = [Case((n,)) for n in sizes]
    cases += [
        Case((n,), values=values)
        for n in (1, 300, 5000)
        for values in ("special", "zeros", "constant", "nonfinite")
    ]
    cases += [Case((n,), values="negative") for n in (1, 300)]
    cases += [Case((n,), values="uneven") for n in (5000, 70_001)]
    cases += [Case((n,), values="halfway") for n in HALFWAY_TAILS]
    cases += [Case((300,), layout=layout) for layout in ("offset", "step")]
    return tuple(cases)


def _bytes(case: Case) -> int:
    return 5 * case.numel + 4 * formats.num_blocks(case.numel, formats.NESTED_BLOCK_SIZE) + 4


SPEC = OpSpec("quantize_absmax", _cases(), _inputs, "bitwise", _bytes, main="absmax")
