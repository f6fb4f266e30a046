"""The op's factors, and what the op refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qkern import backends, ops, reference
from qkern.backends import cpu


@pytest.mark.parametrize("in_tensors", [False, True], ids=["numbers", "tensors"])
def test_factors_are_those_of_the_paper(in_tensors: bool) -> None:
    steps = [1, 2, 10, 1000, 1 << 20]
    lr, beta1, beta2, eps, decay, scale = 3e-4, 0.9, 0.999, 1e-8, 0.1, -0.25
    given = [torch.tensor([v], dtype=torch.float64) if in_tensors else v for v in (lr, scale)]
    found = reference.adamw_factors(
        torch.tensor(steps, dtype=torch.float32), given[0], beta1, beta2, eps, decay, given[1]
    )
    expected = [
        (
            *(scale, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2),
            *(lr / (1 - beta1**t), 1 / math.sqrt(1 - beta2**t), eps, 0.0, float(t)),
        )
        for t in steps
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"factors": torch.zeros(10)}, ValueError, r"factors: got shape \[10\]; takes \[n, 10\]"),
        ({"factors": torch.zeros(2, 9)}, ValueError, r"factors: got shape \[2, 9\]"),
        ({"factors": torch.zeros(2, 10).double()}, TypeError, "factors: got torch.float64"),
        ({"factors": torch.zeros(10, 2).T}, ValueError, "factors: got strides"),
        ({"factors": torch.zeros(0, 10)}, ValueError, r"indices: got \[0\]; takes rows of factors"),
        ({"indices": [2]}, ValueError, r"indices: got \[2\]; takes rows of factors, of 2"),
        ({"indices": [-1]}, ValueError, r"indices: got \[-1\]"),
        ({"indices": [0, 1]}, ValueError, "lists of different lengths"),
        ({"offsets": [0, 256]}, ValueError, "lists of different lengths"),
        ({"offsets": [128]}, ValueError, r"offsets: got \[128\]; takes multiples of 256"),
        ({"offsets": [-256]}, ValueError, r"offsets: got \[-256\]; takes multiples of 256"),
        ({"grads": []}, ValueError, "lists of different lengths"),
        ({"grads": [torch.zeros(3)]}, ValueError, "grad: got 3 elements; takes 4"),
    ],
    ids=str,
)
@pytest.mark.skipif(cpu.missing_reason() is not None, reason=str(cpu.missing_reason()))
def test_the_op_refuses(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"params": [torch.zeros(4)], "grads": [torch.zeros(4)]}
    arguments |= {"exp_avgs": [torch.zeros(4)], "exp_avg_sqs": [torch.zeros(4)]}
    arguments |= {"exp_avg_absmaxes": [], "exp_avg_sq_absmaxes": []}
    arguments |= {"factors": torch.zeros(2, 10)} | change
    with pytest.raises(error, match=text):
        torch.ops.qkern.adamw_step(**arguments)


@pytest.mark.parametrize("in_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_are_float32_whatever_torchs_default_is(
    in_tensors: bool, dtype: torch.dtype
) -> None:
    given = [torch.tensor(v) if in_tensors else v for v in (1e-3, 0.5)]
    steps = torch.tensor([1.0, 7.0])
    arguments = (steps, given[0], 0.9, 0.999, 1e-8, 0.01, given[1])
    expected = reference.adamw_factors(*arguments)
    torch.set_default_dtype(dtype)
    try:
        found = reference.adamw_factors(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", ["op", "call without the op", "reference"])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.skipif(cpu.missing_reason() is not None, reason=str(cpu.missing_reason()))
def test_what_a_step_writes_counts_as_changed_and_nothing_else(bits: int, how: str) -> None:
    """autograd and views know by ``_version`` what has changed under them."""
    params = [torch.randn(512), torch.randn(300)]
    dtype = torch.float32 if bits == 32 else torch.uint8
    moments = [[torch.zeros(p.shape, dtype=dtype) for p in params] for _ in range(2)]
    scales = [[torch.ones(-(-p.numel() // 256)) for p in params if bits == 8] for _ in range(2)]
    grads = [torch.randn(p.shape) for p in params]
    factors = reference.adamw_factors(torch.ones(2), 0.1, 0.9, 0.999, 1e-8, 0.01)
    written = [*params, *moments[0], *moments[1], *scales[0], *scales[1]]
    read = [*grads, factors]
    before = [(t._version, t.clone()) for t in (*written, *read)]
    arguments = (params, grads, *moments, *scales, factors, None, [0, 1], [0, 0])
    if how == "op":
        torch.ops.qkern.adamw_step(*arguments)
    elif how == "call without the op":
        ops.adamw_step(*arguments)
    else:
        with backends.use("reference"):
            torch.ops.qkern.adamw_step(*arguments)
    for number, (tensor, (version, value)) in enumerate(
        zip([*written, *read], before, strict=True)
    ):
        if number < len(written):
            assert tensor._version > version
        else:
            assert tensor._version == version
            assert torch.equal(tensor, value)
