"""Every Triton op on the emulated kernels, by the op table: see tools/lab/triton/README.md.

Quick tests take some of the cases, slow ones all that are small and some of the large; each case is
launched for one of the devices.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from lab.processes import environment
from lab.triton import semantics
from qkern import backends, testing
from qkern.backends import triton
from qkern.testing import DTYPES, OPS, Case, OpSpec
from tests.ops import test_conformance as conformance

if reason := triton.missing_reason():
    pytest.skip(reason, allow_module_level=True)
if importlib.util.find_spec("ttsem") is None:
    pytest.skip("ttsem is not installed", allow_module_level=True)

SPECS = [spec for spec in OPS.values() if backends.has_kernel("triton", spec.name)]
TABLE = [(spec, case) for spec in SPECS for case in spec.cases]
SMALL = 70_000
"""Elements, or multiply-adds: a larger case is emulated for seconds, and exercises nothing else."""
QUICK_STRIDE = 16
EVERY_CASE = bool(os.environ.get("QKERN_TRITON_EVERY_CASE"))
"""Whether slow tests are all cases, as `make test-triton` asks."""
SMALL_STRIDE, LARGE_STRIDE = (1, 1) if EVERY_CASE else (3, 24)
CPU = torch.device("cpu")

targets = {str(device): semantics.SemanticsTarget(device) for device in semantics.DEVICES}


def params() -> list[object]:
    found = []
    small = [(spec, case) for spec, case in TABLE if case.numel <= SMALL]
    large = [(spec, case) for spec, case in TABLE if case.numel > SMALL]
    for i, (spec, case) in enumerate([*small, *large[::LARGE_STRIDE]]):
        target = targets[str(semantics.DEVICES[i % len(semantics.DEVICES)])]
        quick = i % QUICK_STRIDE == i // QUICK_STRIDE % QUICK_STRIDE and case.numel <= SMALL
        if quick or i % SMALL_STRIDE == 0 or case.numel > SMALL:
            marks = [] if quick else [pytest.mark.slow]
            found.append(pytest.param(spec, case, target, id=spec.id(case, target), marks=marks))
    return found


@pytest.mark.parametrize(("spec", "case", "on"), params())
@semantics.in_own_process
def test_op(spec: OpSpec, case: Case, on: semantics.SemanticsTarget) -> None:
    testing.check(spec, case, on, CPU)


every_target = pytest.mark.parametrize("on", targets.values(), ids=list(targets))
one_target = pytest.mark.parametrize("on", [targets["sm_90"]], ids=["sm_90"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
matmuls = pytest.mark.parametrize(
    "spec", conformance.MATMULS, ids=[spec.name for spec in conformance.MATMULS]
)


@dtypes
@matmuls
@every_target
@pytest.mark.slow
@semantics.in_own_process
def test_batch_invariant(spec: OpSpec, on: semantics.SemanticsTarget, dtype: torch.dtype) -> None:
    """A row's bits do not depend on how many rows come with it, nor on which place it has."""
    case = Case((70, 37, 130), dtype, double_quant=True, batch_invariant=True)
    inputs = conformance.inputs_of(spec, case, CPU)
    (whole,) = conformance.run(spec, inputs, on)
    for count in (1, 5, 17, 64):
        part = spec.rows(inputs, slice(70 - count, None))
        testing.assert_bitwise(conformance.run(spec, part, on)[0], whole[70 - count :])


@one_target
@pytest.mark.parametrize("layout", ["contiguous", "offset"])
@semantics.in_own_process
def test_dequantize_into_out(layout: str, on: semantics.SemanticsTarget) -> None:
    conformance.test_dequantize_into_out(on, torch.bfloat16, layout, True, CPU)


@one_target
@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
@semantics.in_own_process
def test_same_call_gives_the_same_bits(spec: OpSpec, on: semantics.SemanticsTarget) -> None:
    shape = (3, 70, 515) if spec.multiplies else (4001,)
    inputs = conformance.inputs_of(spec, Case(shape), CPU)
    first, again = (conformance.run(spec, inputs, on) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        testing.assert_bitwise(a, b)


@one_target
@dtypes
@matmuls
@semantics.in_own_process
def test_nonfinite_activations_stay_in_their_row(
    spec: OpSpec, on: semantics.SemanticsTarget, dtype: torch.dtype
) -> None:
    conformance.test_nonfinite_activations_stay_in_their_row(spec, on, dtype, CPU)


@pytest.mark.slow
@one_target
@dtypes
@pytest.mark.parametrize("cols", [96, 416])
@matmuls
@semantics.in_own_process
def test_a_nonfinite_scale_stays_in_its_block(
    spec: OpSpec, cols: int, on: semantics.SemanticsTarget, dtype: torch.dtype
) -> None:
    conformance.test_a_nonfinite_scale_stays_in_its_block(spec, on, cols, 3, dtype, CPU)


@one_target
@matmuls
@semantics.in_own_process
def test_any_leading_dimensions(spec: OpSpec, on: semantics.SemanticsTarget) -> None:
    for lead in ((), (2, 0, 3), (2, 1, 3)):
        conformance.test_any_leading_dimensions(spec, on, lead, CPU)


@one_target
@matmuls
@semantics.in_own_process
def test_float16_overflow_is_infinite_not_wrapped(
    spec: OpSpec, on: semantics.SemanticsTarget
) -> None:
    conformance.test_float16_overflow_is_infinite_not_wrapped(spec, on, CPU)


@one_target
@semantics.in_own_process
def test_values_at_the_edge(on: semantics.SemanticsTarget) -> None:
    conformance.test_a_huge_scale_and_gradient_spread_no_nan(on, CPU)
    conformance.test_unchecked_nan_block_has_the_canonical_nan(on, CPU)
    for dtype in DTYPES:
        conformance.test_every_nan_stays_nan(on, dtype, CPU)


@one_target
@pytest.mark.parametrize("bits", [32, 8])
@semantics.in_own_process
def test_adamw_takes_any_list(bits: int, on: semantics.SemanticsTarget) -> None:
    """Of mixed dtypes and alignments, some parameters empty."""
    spec = OPS["adamw_step"]
    found: testing.Inputs = {}
    for dtype, layout, size in itertools.product(DTYPES, ("contiguous", "offset"), (0, 2100)):
        case = Case((size,), dtype, 256, bits=bits, layout=layout, stochastic_rounding=True)
        inputs = conformance.inputs_of(spec, case, CPU)
        rows = len(found.get("factors", ()))
        inputs["indices"] = [rows + index for index in inputs["indices"]]
        for name, value in inputs.items():
            if isinstance(value, list):
                found[name] = found.get(name, []) + value
        found["factors"] = torch.cat(
            [found.get("factors", inputs["factors"][:0]), inputs["factors"]]
        )
    found["seed"] = inputs["seed"]
    assert len(found["params"]) == 60
    for got, expected in zip(conformance.run(spec, found, on), spec.reference(found), strict=True):
        testing.assert_bitwise(got, expected)


@one_target
@semantics.in_own_process
def test_the_mean_of_scales_is_exact(on: semantics.SemanticsTarget) -> None:
    semantics.check_exact_means(on)


@semantics.in_own_process
def test_large_launches_were_checked_for_races() -> None:
    """By address ranges where not access by access; a few whose ranges meet are not."""
    assert len(semantics.unchecked) < 40


def interpret(stride: int, largest: int, first: int = 0) -> None:
    """`interpreter` in a process of its own: Triton decides at import if it interprets."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lab.triton.interpreter"]
        + [str(stride), str(largest), str(first)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
    )
    last = (done.stdout.splitlines() or ["(before the first case)"])[-1]
    assert done.returncode == 0, f"{last}: {done.stderr}"
    assert last.endswith("cases")


def test_some_cases_in_tritons_interpreter() -> None:
    interpret(61, 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(4))
def test_small_cases_in_tritons_interpreter(first: int) -> None:
    interpret(12, SMALL, 3 * first)
