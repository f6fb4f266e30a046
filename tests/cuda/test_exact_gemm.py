"""What torch may do to a vendor's product, and not while a weight's slices are multiplied."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.cuda.emulator import backend, build
from qkern.backends import _cuda_matmul
from qkern.backends._exact_gemm import exact_products
from qkern.testing import DTYPES, OPS, Case

MATMUL = torch.backends.cuda.matmul
REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
FLAGS = (*REDUCTIONS, "allow_fp16_accumulation", "fp32_precision", "allow_tf32")


def flags() -> dict[str, Any]:
    """The settings that this version of torch has."""
    names = [name for name in FLAGS if hasattr(MATMUL, name)]
    names += [f"{name}_split_k" for name in REDUCTIONS if hasattr(MATMUL, f"{name}_split_k")]
    return {name: getattr(MATMUL, name) for name in names}


def assert_exact() -> None:
    assert not any(getattr(MATMUL, name) for name in REDUCTIONS)
    assert not getattr(MATMUL, "allow_fp16_accumulation", False)
    if hasattr(MATMUL, "fp32_precision"):
        assert MATMUL.fp32_precision == "ieee"
    else:
        assert not MATMUL.allow_tf32


@pytest.fixture(params=["default", "tf32", "tf32_by_name", "fewer_splits"])
def as_users_set(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What a user has set, by the older names and the newer ones, and nothing of it afterwards."""
    before = flags()
    if request.param == "tf32":
        MATMUL.allow_tf32 = True
    elif request.param == "tf32_by_name":
        if "fp32_precision" not in before:
            pytest.skip("this version of torch has no fp32_precision")
        MATMUL.fp32_precision = "tf32"
    elif request.param == "fewer_splits":
        if f"{REDUCTIONS[0]}_split_k" not in before:
            pytest.skip("this version of torch has no such setting")
        MATMUL.allow_bf16_reduced_precision_reduction = (False, False)
    yield flags() if request.param != "tf32_by_name" else {"fp32_precision": "tf32"}
    for name in REDUCTIONS:
        setattr(MATMUL, name, before[name])
    for name in ("fp32_precision", "allow_tf32"):
        if name in before:
            setattr(MATMUL, name, before[name])


def test_settings_are_exact_inside_and_as_before_outside(as_users_set: dict[str, Any]) -> None:
    def fail() -> None:
        with exact_products():
            with exact_products():
                assert_exact()
            assert_exact()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {name: getattr(MATMUL, name) for name in as_users_set} == as_users_set


def test_the_last_of_several_threads_sets_what_was(as_users_set: dict[str, Any]) -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact_products():
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=other)
    with exact_products():
        thread.start()
        assert inside.wait(60)
    assert_exact()
    leave.set()
    thread.join()
    assert {name: getattr(MATMUL, name) for name in as_users_set} == as_users_set


@pytest.mark.skipif(build.compiler() is None, reason="the emulator needs g++ or CXX")
@pytest.mark.parametrize("name", ["linear_4bit", "linear_4bit_dx"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_are_multiplied_exactly(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = backend.EmulatedTarget(build.load(build.build("plain")), backend.SCHEDULES[0])
    monkeypatch.setenv("QKERN_CUDA_PATH", "gemm")
    found = []
    before = flags()
    with target.activate():
        multiply = _cuda_matmul.multiply

        def record(x: Tensor, part: Tensor, bias: Tensor | None, out: Tensor) -> None:
            assert_exact()
            found.append(x.dtype)
            multiply(x, part, bias, out)

        monkeypatch.setattr(_cuda_matmul, "multiply", record)
        case = Case((3, 128, 96), dtype)
        OPS[name].run(OPS[name].make_inputs(case, torch.device("cpu"), torch.Generator()))
    assert found
    assert flags() == before
