"""One case of one op on one target, against the reference."""

from __future__ import annotations

import contextlib
import functools
import os
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qkern.testing._judge import assert_bitwise, assert_matmul, assert_product
from qkern.testing._spec import Case, Inputs, OpSpec
from qkern.testing._targets import Target
from qkern.testing.specs import OPS

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill what torch allocates with NaN (integers: their maximum) while the context lasts.

    So an element that a kernel forgot to write never passes for a result. torch fills only where
    algorithms are to be deterministic, and then warns of a cuBLAS that was not told to be: at a
    process's first matmul on a GPU, which should be inside.
    """
    deterministic: Any = torch.utils.deterministic
    told = os.environ.get(_CUBLAS)
    os.environ[_CUBLAS] = told or ":4096:8"
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)
        if told is None:
            os.environ.pop(_CUBLAS, None)


def _generator(spec: OpSpec, case: Case) -> torch.Generator:
    seed = zlib.crc32(f"{spec.name}-{case}".encode())
    return torch.Generator().manual_seed(seed)


@functools.lru_cache(maxsize=4)
def _prepare(name: str, case: Case, device: str) -> tuple[Inputs, tuple[Tensor, ...]]:
    """A case's inputs and what is expected of them; for a matmul, the exact weight.

    The last few are kept: tests run one case on every target in turn.
    """
    spec = OPS[name]
    inputs = spec.make_inputs(case, torch.device(device), _generator(spec, case))
    if spec.comparison == "bitwise":
        return inputs, spec.reference(inputs)
    if spec.comparison == "product":
        return inputs, ()
    return inputs, (spec.exact_weight(inputs, case),)


def check(
    spec: OpSpec, case: Case, target: Target, device: torch.device | str | None = None
) -> None:
    """Run `case` on `target` with poisoned outputs; raise AssertionError where it is wrong.

    `device` defaults to the target's device type. The inputs depend only on op and case.
    """
    inputs, expected = _prepare(spec.name, case, str(device or target.device_type))
    with target.activate(), poisoned_outputs():
        actual = spec.run(inputs)
    if spec.comparison == "bitwise":
        assert len(actual) == len(expected), f"{len(actual)} results, not {len(expected)}"
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_bitwise(a, e, f"{spec.name} result {index}")
        return
    if spec.judge is not None:
        spec.judge(actual[0], inputs, *expected)
        return
    if spec.comparison == "product":
        a, b, alpha = inputs["a"], inputs["b"], inputs["alpha"]
        assert_product(actual[0], a, b, alpha, inputs["out"] if inputs["accumulate"] else None)
        return
    added = (inputs["left"], inputs["right"], inputs["alpha"]) if "left" in inputs else None
    assert_matmul(actual[0], inputs[spec.main], expected[0], inputs.get("bias"), added)
