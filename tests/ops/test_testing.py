"""The comparisons themselves: each must fail on the faults it is there to find."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch

from qkern import testing
from qkern.testing import DTYPES, OPS, Case
from qkern.weight import Weight

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)


def test_assert_bitwise_takes_equal_bits_and_any_nan() -> None:
    x = torch.tensor([0.0, -0.0, 1.5, math.inf, math.nan])
    y = x.clone()
    y.view(torch.int32)[4] = 0x7F800001
    testing.assert_bitwise(x, y)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), "0.0, not -0.0"),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]), "1 of 1 differ"),
        (torch.tensor([1.0]), torch.tensor([math.nan]), "not nan"),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float16), "dtype"),
        (torch.tensor([[1.0]]), torch.tensor([1.0]), "shape"),
        (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), r"first at \(2,\): 3, not 4"),
    ],
)
def test_assert_bitwise_finds(actual: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.assert_bitwise(actual, expected)


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(24, 512).to(dtype), torch.randn(48, 512) * 0.05, torch.randn(48).to(dtype)


@dtypes
def test_assert_matmul_takes_float32_accumulation(dtype: torch.dtype) -> None:
    x, w, b = problem(dtype)
    y = (x.float() @ w.mT + b.float()).to(dtype)
    testing.assert_matmul(y, x, w, b)
    parts = sum(x[:, i::4].float() @ w[:, i::4].mT for i in range(4)) + b.float()
    testing.assert_matmul(parts.to(dtype), x, w, b)


@dtypes
def test_assert_matmul_finds_what_a_kernel_may_get_wrong(dtype: torch.dtype) -> None:
    x, w, b = problem(dtype)
    exact = x.double() @ w.double().mT + b.double()
    lost_tail = (x[:, :-1].double() @ w[:, :-1].double().mT + b.double()).to(dtype)
    lost_bias = (exact - b.double()).to(dtype)
    swapped = exact.to(dtype)
    swapped[[3, 4]] = swapped[[4, 3]]
    one_nan = exact.to(dtype)
    one_nan[7, 7] = math.nan
    coarse = torch.bfloat16 if dtype == torch.float32 else torch.float8_e4m3fn
    rounded_weight = (x.double() @ w.to(coarse).double().mT + b.double()).to(dtype)
    for wrong in (lost_tail, lost_bias, swapped, one_nan, rounded_weight):
        with pytest.raises(AssertionError):
            testing.assert_matmul(wrong, x, w, b)


def test_assert_matmul_finds_16_bit_accumulation() -> None:
    x, w, _ = problem(torch.bfloat16)
    y = torch.zeros(24, 48, dtype=torch.bfloat16)
    for k in range(0, 512, 64):
        y += (x[:, k : k + 64].float() @ w[:, k : k + 64].mT).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_matmul(y, x, w)


def test_assert_matmul_finds_two_roundings_of_the_bias() -> None:
    x, w, b = problem(torch.bfloat16)
    b *= 30
    y = (x.float() @ w.mT).to(torch.bfloat16) * 30 + b
    with pytest.raises(AssertionError, match="error"):
        testing.assert_matmul(y, x * 30, w, b)


@pytest.mark.parametrize("steps", [1, 2])
@dtypes
def test_neighbours(dtype: torch.dtype, steps: int) -> None:
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0**-20, -3.0]).to(dtype)
    around = testing.neighbours(x, steps)
    assert around.shape == (6, 2 * steps + 1)
    assert (around[:, steps] == x).all()
    assert (around.double().diff(dim=1) > 0).all()
    up = torch.nextafter(x, torch.full_like(x, math.inf))
    down = torch.nextafter(x, torch.full_like(x, -math.inf))
    assert (around[:, steps + 1] == up).all()
    assert (around[:, steps - 1] == down).all()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)], ids=str)
def test_with_layout(shape: tuple[int, ...], layout: str) -> None:
    x = torch.randn(shape)
    y = testing.with_layout(x, layout)
    if layout == "expanded" and len(shape) > 1:
        assert y.stride(0) == 0
        x = x[:1].expand(shape)
    testing.assert_bitwise(y, x)
    if layout in ("offset", "rows"):
        assert y.storage_offset() == 1
    if layout in ("step", "transposed", "rows") and len(shape) > 1:
        assert not y.is_contiguous()


def test_poisoned_outputs_fills_and_restores() -> None:
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        with testing.poisoned_outputs():
            assert torch.empty(9).isnan().all()
            assert torch.ones(9).new_empty(4, dtype=torch.float16).isnan().all()
            assert (torch.empty_like(torch.ones(3, dtype=torch.uint8)) == 255).all()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_deterministic_debug_mode(mode)


@pytest.mark.parametrize("told", [None, ":16:8"])
def test_poisoned_outputs_tells_cublas_to_be_deterministic(
    monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    """Else torch warns at the first matmul on a GPU, which tests take for an error."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    if told is not None:
        monkeypatch.setenv(name, told)
    with testing.poisoned_outputs():
        assert os.environ[name] == (told or ":4096:8")
    assert os.environ.get(name) == told


def test_bytes_and_flops() -> None:
    case = Case((8, 4096, 4096), torch.bfloat16, double_quant=True)
    weight = 4096 * 4096 // 2 + 4096 * 64 + 4 * 1024 + 4
    assert OPS["linear_4bit"].bytes(case) == weight + 2 * 8 * 2 * 4096
    assert OPS["linear_4bit"].flops(case) == 2 * 8 * 4096 * 4096
    case = Case((4096, 4096), torch.bfloat16, double_quant=True)
    assert OPS["dequantize_4bit"].bytes(case) == weight + 2 * 4096 * 4096
    assert OPS["dequantize_4bit"].flops(case) == 0


@pytest.mark.parametrize("name", OPS)
def test_bytes_count_the_tensors_of_a_case(name: str) -> None:
    """The bytes of a case are those of its inputs and results, tables of 16 values aside."""
    spec = OPS[name]
    for case in spec.cases[:: max(1, len(spec.cases) // 12)]:
        if case.layout != "contiguous":
            continue
        inputs = spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
        unread = {"codebook"} if inputs.get("accumulate", True) else {"codebook", "out"}
        if spec.comparison == "grouped":
            unread |= {"bias", "right", *Weight._fields}
        values = [value for name, value in spec.by_name(inputs).items() if name not in unread]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        if spec.comparison == "grouped":
            tensors += tensors_of_used_experts(inputs, case)
        tensors += spec.reference(inputs)
        assert spec.bytes(case) == sum(t.nbytes for t in tensors), str(case)


def tensors_of_used_experts(inputs: testing.Inputs, case: Case) -> Iterator[torch.Tensor]:
    """The fields of the weights, and the biases, of experts that have rows."""
    begin, numel = 0, math.prod(case.shape[1:])
    for expert, end in enumerate(inputs["offsets"].tolist()):
        if end > begin:
            fields = inputs["weight"].of_expert(expert, numel).named_tensors()
            yield from (tensor for name, tensor in fields.items() if name != "codebook")
            yield from (inputs[n][expert] for n in ("bias", "right") if inputs.get(n) is not None)
        begin = end


def test_register_target_refuses_a_name_twice() -> None:
    with pytest.raises(ValueError, match="registered already"):
        testing.register_target(testing.Target("reference"))
