"""bitsandbytes is right in the tests where it is their oracle, on any processor."""

from __future__ import annotations

import pytest
import torch

from qkern import reference
from qkern.weight import Weight

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(5, 96), (33, 64), (40, 192), (4, 64), (3, 2, 96)])
def test_rows_that_are_no_whole_blocks(
    shape: tuple[int, ...], format: str, dtype: torch.dtype
) -> None:
    w = torch.randn(shape)
    for block_size in (64, 128):
        packed, state = functional.quantize_4bit(w.to(dtype), None, None, block_size, False, format)
        found = functional.dequantize_4bit(packed, state)
        weight = Weight(packed.flatten(), state.absmax, None, None, None, format, block_size)
        expected = reference.dequantize_4bit(weight, shape, torch.float32)
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-6)
