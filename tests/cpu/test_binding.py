"""The compiled functions on pointers: what they refuse, and that they keep nothing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from qkern.backends import cpu
from qkern.testing import OPS

if reason := cpu.missing_reason():
    pytest.skip(reason, allow_module_level=True)
_C = cpu.library()


def quantize_arguments() -> tuple[list[torch.Tensor], list[Any]]:
    """Tensors to keep alive, and the arguments of ``quantize_4bit`` for them."""
    x, packed, absmax = torch.randn(128), torch.zeros(64, dtype=torch.uint8), torch.zeros(2)
    addresses = packed.data_ptr(), absmax.data_ptr()
    return [x, packed, absmax], [x.data_ptr(), 0, 128, None, 0, 64, *addresses, 1]


def test_every_op_has_a_function() -> None:
    for name in OPS:
        assert getattr(_C, name).__name__ == name


@pytest.mark.parametrize(
    ("position", "bad", "error", "message"),
    [
        (1, 3, ValueError, r"dtype: takes 0 \(float32\)"),
        (1, -1, ValueError, "dtype: takes"),
        (2, -1, ValueError, "sizes: take 0 and above"),
        (4, 3, ValueError, r"format_id: takes 0 \(nf4\), 1 \(fp4\) or 2 \(custom\)"),
        (4, 2, ValueError, "codebook: absent for format custom"),
        (5, 48, ValueError, "block_size: takes a power of two from 32 to 16384"),
        (5, 32768, ValueError, "block_size: takes"),
        (8, 0, ValueError, "num_threads: takes 1 and above"),
        (2, 1.5, TypeError, "float"),
        (2, "a", TypeError, "str"),
        (2, 1 << 64, OverflowError, "int too big"),
        (8, (1, 1), TypeError, "quantize_4bit: got too many arguments"),
    ],
)
def test_wrong_values_are_refused(
    position: int, bad: object, error: type[Exception], message: str
) -> None:
    tensors, right = quantize_arguments()
    with pytest.raises(error, match=message):
        _C.quantize_4bit(*right[:position], bad, *right[position + 1 :])
    assert not tensors[2].any()
    _C.quantize_4bit(*right)
    assert tensors[2].all()


def test_a_wrong_number_of_arguments_is_refused() -> None:
    tensors, right = quantize_arguments()
    for given, what in ((right[:-1], "few"), ([*right, 1], "many"), ([], "few")):
        with pytest.raises(TypeError, match=f"quantize_4bit: got too {what} arguments"):
            _C.quantize_4bit(*given)
    with pytest.raises(TypeError, match="keyword"):
        _C.quantize_4bit(*right, num_threads=1)
    assert not tensors[2].any()


def test_a_weight_with_one_of_the_nested_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="nested_absmax and nested_offset: take both or neither"):
        _C.dequantize_4bit(64, 64, 64, None, None, 0, 64, 64, 0, 64, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({5: None}, "absmax: takes those of both moments or neither"),
        ({10: 128}, "first: takes a multiple of the block size"),
        ({9: -1}, "sizes: take 0 and above"),
    ],
)
def test_wrong_parameters_of_a_step_are_refused(
    changes: dict[int, int | None], message: str
) -> None:
    piece: list[int | None] = [64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0]
    for position, bad in changes.items():
        piece[position] = bad
    with pytest.raises(ValueError, match=message):
        _C.adamw_step([tuple(piece)], None, 1)
    with pytest.raises(ValueError, match="seed: takes None, or 0 and above"):
        _C.adamw_step([], -1, 1)
    assert _C.adamw_step([], 3, 1) is None


def test_no_reference_is_kept() -> None:
    tensors, right = quantize_arguments()
    before = [sys.getrefcount(value) for value in (right[0], right[6])]
    for _ in range(100):
        _C.quantize_4bit(*right)
        with pytest.raises(TypeError):
            _C.quantize_4bit(*right, 1)
    assert [sys.getrefcount(value) for value in (right[0], right[6])] == before
    assert tensors[2].all()


def test_a_product_without_steps_is_zero() -> None:
    out = torch.full((2, 8), torch.nan)
    a, b = torch.ones(2, 1), torch.ones(1, 8)
    half = int(torch.tensor(0.5).view(torch.int32))
    sizes = [out.data_ptr(), 0, 2, 8, 0, 8]
    _C.matmul_into(*sizes, a.data_ptr(), 0, 1, 1, b.data_ptr(), 0, 8, 1, half, False, 1)
    assert (out == 0).all()


def pointers() -> list[tuple[str, list[Any], int, bool]]:
    """Each argument of each function that is an address: which, and whether it may be absent.

    The addresses point nowhere: nothing is read before all arguments are.
    """
    weight = [64, 64, 64, 64, 64, 2, 64]
    optional = range(2, 5)
    term = [3, 64, 3, 64, 64, 1, 0]
    piece = (64, 64, 64, 64, 64, 64, 64, 0, 64, 0, 0)
    calls: dict[str, tuple[list[Any], list[int], list[int]]] = {
        # Arguments, positions that must be addresses, positions that may be.
        "quantize_4bit": ([64, 0, 64, 64, 2, 64, 64, 64], [0, 6, 7], []),
        "dequantize_4bit": ([*weight, 64, 0, 64], [0, 1, 7], []),
        "quantize_8bit": ([64, 0, 64, 64, 256, 64, 64], [0, 3, 5, 6], []),
        "dequantize_8bit": ([64, 64, 64, 256, 64, 0, 64], [0, 1, 2, 4], []),
        "quantize_absmax": ([64, 0, 64, 64, 64, 64], [0, 3, 4, 5], []),
        "linear_4bit": ([64, 0, 1, 64, *weight, 1, 64, 64, 64, False], [0, 4, 5, 14], [13]),
        "linear_4bit_int8": ([64, 0, 1, 64, *weight, 1, 64, 64, 64, False], [0, 4, 5, 14], [13]),
        "linear_4bit_dx": ([64, 0, 1, 64, *weight, 1, 64, 64, False], [0, 4, 5, 13], []),
        "linear_4bit_add": (
            [64, 0, 1, 64, *weight, 1, 64, 64, 64, False, *term],
            [0, 4, 5, 14, 17, 19],
            [13],
        ),
        "linear_4bit_dx_add": (
            [64, 0, 1, 64, *weight, 1, 64, 64, False, *term],
            [0, 4, 5, 13, 16, 18],
            [],
        ),
    }
    found = []
    for op, (arguments, required, others) in calls.items():
        start = 0 if op == "dequantize_4bit" else 4 if op.startswith("linear_4bit") else None
        nested = [] if start is None else [start + k for k in optional]
        codebook = [3] if op == "quantize_4bit" else []
        places = [*((k, False) for k in required), *((k, True) for k in others + nested + codebook)]
        found += [(op, arguments, k, absent) for k, absent in places]
    steps = [([piece], k, k in (4, 5)) for k in range(7)]
    return found + [("adamw_step", [p[0], None], k, absent) for p, k, absent in steps]


@pytest.mark.parametrize(("op", "arguments", "position", "may_be_absent"), pointers())
def test_only_none_says_that_a_tensor_is_absent(
    op: str, arguments: list[Any], position: int, may_be_absent: bool
) -> None:
    """The address of freed memory is 0: no argument takes it, not even one that may be absent."""

    def call(value: int | None) -> None:
        changed = [*arguments]
        if op == "adamw_step":
            piece = changed[0]
            changed[0] = [(*piece[:position], value, *piece[position + 1 :])]
        else:
            changed[position] = value
        getattr(_C, op)(*changed, 0)  # no threads: refused, after all addresses

    with pytest.raises(ValueError, match="address: got 0, that of freed memory"):
        call(0)
    expected = "take|absent" if may_be_absent else "address: got None; takes that of a tensor"
    with pytest.raises(ValueError, match=expected) as error:
        call(None)
    assert ("address" in str(error.value)) is not may_be_absent
