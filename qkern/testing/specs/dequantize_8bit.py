"""dequantize_8bit: bytes and scales to values."""

from __future__ import annotations

import torch

from qkern import formats
from qkern.testing._spec import Case, Inputs, OpSpec
from qkern.testing._values import place, scales
from qkern.testing.specs._common import bytes_of_8_bits, cases_of_8_bits


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    blocks = formats.num_blocks(case.numel, case.block_size)
    inputs = {
        "codes": torch.randint(256, case.shape, dtype=torch.uint8, generator=generator),
        "absmax": scales(blocks, case.values, generator),
        "map": formats.map_tensor(case.map),
        "block_size": case.block_size,
        "dtype": case.dtype,
    }
    return place(inputs, case, device, "codes")


SPEC = OpSpec(
    "dequantize_8bit",
    cases_of_8_bits(("special", "zeros", "nonfinite")),
    _inputs,
    "bitwise",
    bytes_of_8_bits,
    main="codes",
)
