"""What the op table does not ask of the emulated dequantise kernel, bit for bit."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lab.cuda.emulator import backend, build
from qkern import backends
from qkern.testing import DTYPE_NAMES, DTYPES

if build.compiler() is None:
    pytest.skip("the emulator needs g++ or CXX", allow_module_level=True)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)


def both(
    library: ModuleType, packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The emulated kernel's values and the reference's."""

    def run() -> torch.Tensor:
        shape = (2 * packed.numel(),)
        return torch.ops.qkern.dequantize_4bit(
            packed, absmax, None, None, None, "nf4", 64, shape, dtype
        )

    with backend.EmulatedTarget(library, backend.SCHEDULES[0]).activate():
        got = run()
    with backends.use("reference"):
        return got, run()


@dtypes
def test_blocks_that_go_round_their_loop(library: ModuleType, dtype: torch.dtype) -> None:
    """A launch has as many blocks as run at once, so large weights take them several rounds."""
    n = 4 * 108 * 8192 * 2 + 8192 + 1024 + 96
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(256, (n // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-n // 64), generator=generator)
    got, expected = both(library, packed, absmax, dtype)
    assert torch.equal(got, expected)


@dtypes
def test_scales_that_are_no_numbers_or_at_the_ends(library: ModuleType, dtype: torch.dtype) -> None:
    """Products round to infinities and to subnormals; what is not finite stays that."""
    special = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.4028235e38, -3.4e38]
    special += [1e-45, 1e-38, 1.2e-38, 65504.0, 65520.0, 6e-8, 3.3895314e38, 3.3961775e38, 1.0]
    absmax = torch.tensor(special * 32)
    packed = torch.arange(256, dtype=torch.uint8).repeat(absmax.numel() // 8 + 1)
    packed = packed[: absmax.numel() * 32].clone()
    got, expected = both(library, packed, absmax, dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got.isnan().any()
    assert got.isinf().any()
