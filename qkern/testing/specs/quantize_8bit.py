"""quantize_8bit: values to bytes and scales."""

from __future__ import annotations

import torch

from qkern import formats
from qkern.testing._spec import Case, Inputs, OpSpec
from qkern.testing._values import place, source
from qkern.testing.specs._common import bytes_of_8_bits, cases_of_8_bits, map_values


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs = {
        "x": source(case, map_values(case), generator),
        "map": formats.map_tensor(case.map),
        "block_size": case.block_size,
    }
    return place(inputs, case, device, "x")


SPEC = OpSpec(
    "quantize_8bit",
    cases_of_8_bits(("special", "ties", "zeros", "nonfinite")),
    _inputs,
    "bitwise",
    bytes_of_8_bits,
    main="x",
)
