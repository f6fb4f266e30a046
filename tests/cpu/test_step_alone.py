"""The optimizer's kernel without its op: only where nobody can tell, and with the same results."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkern import ops, testing
from qkern.backends import cpu
from qkern.testing import OPS, Case
from tests.observers import Ops

SPEC = OPS["adamw_step"]
ORDER = (
    *("params", "grads", "exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes"),
    *("factors", "seed", "indices", "offsets"),
)

pytestmark = pytest.mark.skipif(
    not cpu.fast,
    reason="no native kernels, or a torch without DLPack's C exchange interface",
)


def inputs_of(case: Case) -> dict[str, Any]:
    return SPEC.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))


def arguments_of(inputs: dict[str, Any]) -> list[Any]:
    return [inputs[name] for name in ORDER]


def changed_by(inputs: dict[str, Any]) -> list[Tensor]:
    return [tensor for name in SPEC.writes for tensor in inputs[name]]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.DTYPE_NAMES.get)
def test_every_case_gives_the_references_bits(isa: str, dtype: torch.dtype, bits: int) -> None:
    cases = [case for case in SPEC.cases if (case.dtype, case.bits) == (dtype, bits)]
    assert len(cases) > 10
    for case in cases:
        inputs = inputs_of(case)
        expected = SPEC.reference(inputs)
        before = [t.clone() for t in changed_by(inputs)]
        done = cpu.fast["adamw_step"](*arguments_of(inputs), 2)
        empty = math.prod(case.shape) == 0
        assert done is (None if empty else True), str(case)
        for a, e in zip(changed_by(inputs), before if empty else expected, strict=True):
            testing.assert_bitwise(a, e, str(case))


class Tagged(Tensor):
    """A subclass that torch's own functions keep."""


def wrong_tensors(tensor: Tensor) -> list[Any]:
    flat = tensor.reshape(-1)
    wrong = [None, 1.0, tensor.double(), tensor.to("meta"), tensor.to_sparse()]
    wrong += [tensor.as_subclass(Tagged), flat[:-1], torch.cat([flat, flat])]
    wrong += [flat.repeat_interleave(2)[::2]]
    if tensor.is_floating_point():
        wrong.append(torch._neg_view(-tensor))
    return wrong


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("seed", [None, 5])
def test_the_kernel_takes_nothing_wrong(bits: int, seed: int | None) -> None:
    inputs = inputs_of(Case((300,), torch.bfloat16, block_size=256, bits=bits))
    inputs["seed"] = seed
    right = arguments_of(inputs)
    before = [t.clone() for t in changed_by(inputs)]
    lists = [index for index, value in enumerate(right) if isinstance(value, list) and value]
    refused = 0
    for position in lists:
        value = right[position]
        others: list[Any] = [value[:-1], [*value, value[0]], [*value[:-1], object()]]
        if isinstance(value[0], Tensor):
            others += [[bad, *value[1:]] for bad in wrong_tensors(value[0])]
        else:
            others += [[bad, *value[1:]] for bad in (-1, 1.0, 1 << 70, None)]
        if ORDER[position] == "indices":
            others.append([14, *value[1:]])
        if ORDER[position] == "offsets":
            others.append([128, *value[1:]])
        for other in others:
            given = [*right[:position], other, *right[position + 1 :]]
            assert cpu.fast["adamw_step"](*given, 1) is None, (ORDER[position], other)
            refused += 1
    factors = right[6]
    for other in (*wrong_tensors(factors), factors[:, :9], factors[:5], factors[None]):
        assert cpu.fast["adamw_step"](*right[:6], other, *right[7:], 1) is None, other
    for other in (-1, 1 << 70, 0.5):
        assert cpu.fast["adamw_step"](*right[:7], other, *right[8:], 1) is None
    for threads in (0, -1, 1 << 40, 1.0):
        assert cpu.fast["adamw_step"](*right, threads) is None
    assert refused > 40
    for a, b in zip(changed_by(inputs), before, strict=True):
        testing.assert_bitwise(a, b, "changed by a call that was refused")
    with pytest.raises(TypeError, match="takes 11 arguments"):
        cpu.fast["adamw_step"](*right)
    with pytest.raises(TypeError, match="takes a list"):
        cpu.fast["adamw_step"](3, *right[1:], 1)
    assert cpu.fast["adamw_step"](*right, 1) is True


def test_an_observer_gets_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(Case((300,), block_size=256, bits=32))
    ops.OPS["adamw_step"].overload(*arguments_of(inputs))  # so that the backend is chosen
    answers = []
    kernel = cpu.fast["adamw_step"]

    def counted(*arguments: Any) -> bool | None:
        answers.append(kernel(*arguments))
        return answers[-1]

    monkeypatch.setitem(cpu.fast, "adamw_step", counted)
    ops.adamw_step(*arguments_of(inputs))
    assert answers == [True]
    with Ops() as seen:
        ops.adamw_step(*arguments_of(inputs))
    assert "qkern.adamw_step.default" in seen.seen


def test_what_the_kernel_refuses_has_the_ops_error() -> None:
    arguments = arguments_of(inputs_of(Case((300,), block_size=256, bits=32)))
    ops.OPS["adamw_step"].overload(*arguments)
    with pytest.raises(TypeError, match=r"exp_avg: got torch.float64; takes torch.float32"):
        ops.adamw_step(*arguments[:2], [t.double() for t in arguments[2]], *arguments[3:])


def test_autograd_notices_the_change() -> None:
    """As of any op that changes a tensor which a graph has saved."""
    arguments = arguments_of(inputs_of(Case((300,), block_size=256, bits=32)))
    ops.OPS["adamw_step"].overload(*arguments)
    param = nn.Parameter(torch.ones(300))
    loss = (param * param).sum()
    with torch.no_grad():
        ops.adamw_step([param, *arguments[0][1:]], *arguments[1:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
