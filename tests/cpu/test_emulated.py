"""The kernels of other processors: correctness only, nothing is timed.

AArch64's run under an emulator, AVX-512's and AMX's with intrinsics in plain C++. The server of
`lab.emulated_cpu` runs the sources of csrc/cpu, every buffer against an unmapped page. All of it is
slow: a server alone takes a minute or two to build.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lab.emulated_cpu import backend
from lab.emulated_cpu.build import AVX512, NEON, Flavour
from qkern import testing
from qkern.testing import DTYPES, OPS, Case, Inputs, OpSpec, Target
from tests.ops import test_bitexact, test_conformance

pytestmark = pytest.mark.slow


def parameter(flavour: Flavour, isa: str, *more: object) -> Any:
    """One instruction set of a flavour, and more; skipped where the machine lacks what it takes."""
    lacking = flavour.missing()
    marks = pytest.mark.skipif(lacking is not None, reason=str(lacking))
    name = "-".join(str(part) for part in (isa if flavour != NEON else f"aarch64.{isa}", *more))
    return pytest.param((flavour, isa, *more), id=name, marks=marks)


TARGETS = [
    *((NEON, isa) for isa in NEON.isas),
    *((AVX512, isa) for isa in AVX512.isas if isa != "scalar"),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
CPU = torch.device("cpu")

PARTS = 8  # of the table: a part is a test, so that several workers share the table


@pytest.fixture(scope="module", autouse=True)
def _servers() -> Iterator[None]:
    yield
    backend.close()


@pytest.fixture(params=[parameter(*target) for target in TARGETS])
def emulated(request: pytest.FixtureRequest) -> backend.EmulatedTarget:
    """A target for each instruction set."""
    return backend.EmulatedTarget(*request.param)


def check_all(target: Target, part: int) -> None:
    for spec in OPS.values():
        for case in spec.cases[part::PARTS]:
            print(spec.id(case, target))  # the last one shown is the one that failed
            testing.check(spec, case, target)


SIDES = [
    *(
        parameter(*target, side)
        for target in TARGETS
        for side in ("after", "before")
        if target != (NEON, "scalar") or side == "after"
    ),
]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("where", SIDES)
def test_table(where: tuple[Any, ...], part: int) -> None:
    check_all(backend.EmulatedTarget(*where[:3]), part)


@pytest.mark.parametrize("flavour", [parameter(NEON, "neon"), parameter(AVX512, "amx")])
def test_all_are_there_and_the_widest_is_chosen(flavour: tuple[Flavour, str]) -> None:
    there, best = flavour
    available = backend.server(there, "").available
    assert [isa for isa in available if isa in there.isas][-len(there.isas) + 1 :] == list(
        there.isas[1:]
    )
    assert backend.server(there, "").active == best
    for isa in there.isas:
        assert backend.server(there, isa).active == isa
    assert backend.server(there, "no such").active == "none"


SPECS = pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))


@SPECS
def test_every_op_runs_under_the_emulator(
    spec: OpSpec, emulated: backend.EmulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of this process's own kernels may answer in its place."""
    seen = []
    call = backend.Library._call

    def record(library: backend.Library, op: str, *arguments: object) -> None:
        seen.append(op)
        call(library, op, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backend.Library, "_call", record)
    shape = (3, 16, 64) if spec.multiplies else (3, 64)
    testing.check(spec, Case(shape, rank=5), emulated)
    assert spec.name in seen


MATMULS = pytest.mark.parametrize(
    "spec", test_conformance.MATMULS, ids=[spec.name for spec in test_conformance.MATMULS]
)


@dtypes
def test_dequantize_into_out(emulated: backend.EmulatedTarget, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "offset"):
        for double_quant in (False, True):
            test_conformance.test_dequantize_into_out(emulated, dtype, layout, double_quant, CPU)


@SPECS
def test_any_thread_count_gives_the_same_bits(
    spec: OpSpec, emulated: backend.EmulatedTarget
) -> None:
    test_conformance.test_any_thread_count_gives_the_same_bits(spec, emulated, torch.float32, CPU)


@dtypes
@MATMULS
def test_batch_invariant(
    spec: OpSpec, emulated: backend.EmulatedTarget, dtype: torch.dtype
) -> None:
    for shape in ((37, 130), (128, 512)):
        test_conformance.test_batch_invariant(spec, emulated, dtype, shape, CPU)


@dtypes
@MATMULS
def test_nonfinite_activations_stay_in_their_row(
    spec: OpSpec, emulated: backend.EmulatedTarget, dtype: torch.dtype
) -> None:
    test_conformance.test_nonfinite_activations_stay_in_their_row(spec, emulated, dtype, CPU)


@MATMULS
def test_float16_overflow_is_infinite_not_wrapped(
    spec: OpSpec, emulated: backend.EmulatedTarget
) -> None:
    test_conformance.test_float16_overflow_is_infinite_not_wrapped(spec, emulated, CPU)


def test_a_huge_scale_and_gradient_spread_no_nan(emulated: backend.EmulatedTarget) -> None:
    test_conformance.test_a_huge_scale_and_gradient_spread_no_nan(emulated, CPU)


def test_unchecked_nan_block_has_the_canonical_nan(emulated: backend.EmulatedTarget) -> None:
    test_conformance.test_unchecked_nan_block_has_the_canonical_nan(emulated, CPU)


@dtypes
def test_every_nan_stays_nan(emulated: backend.EmulatedTarget, dtype: torch.dtype) -> None:
    test_conformance.test_every_nan_stays_nan(emulated, dtype, CPU)


@pytest.mark.parametrize(
    ("spec", "shape"),
    test_conformance.SUBNORMAL_CASES,
    ids=[f"{s.name}-{shape[0]}" for s, shape in test_conformance.SUBNORMAL_CASES],
)
def test_flushing_subnormals_to_zero_changes_no_bits(
    spec: OpSpec, shape: tuple[int, ...], emulated: backend.EmulatedTarget
) -> None:
    """The mode that `torch.set_flush_denormal` sets; the server sees that it is put back."""
    inputs = test_conformance.subnormal_inputs(spec, shape)
    torch.set_num_threads(2)
    expected = test_conformance.run(spec, inputs, emulated)
    assert all((result != 0).any() for result in expected if result.numel() > 1000)
    flushing = backend.EmulatedTarget(emulated.flavour, str(emulated.isa), flush=True)
    flushed = test_conformance.run(spec, inputs, flushing)
    for actual, wanted in zip(flushed, expected, strict=True):
        testing.assert_bitwise(actual, wanted)


@pytest.fixture
def bits_elsewhere(monkeypatch: pytest.MonkeyPatch, emulated: backend.EmulatedTarget) -> None:
    """`test_bitexact`'s comparison runs on each instruction set here."""

    def compare(op: str, inputs: Inputs) -> None:
        expected = OPS[op].reference(inputs)
        actual = test_conformance.run(OPS[op], inputs, emulated)
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            testing.assert_bitwise(a, e, f"{op} result {index} on {emulated}")

    monkeypatch.setattr(test_bitexact, "compare_everywhere", compare)


@pytest.mark.usefixtures("bits_elsewhere")
@pytest.mark.parametrize("table", ["nf4", "fp4", *testing.CODEBOOKS])
@dtypes
def test_codes_and_values_bit_for_bit(dtype: torch.dtype, table: str) -> None:
    """Values of every magnitude, and each decision point with its two neighbours."""
    test_bitexact.test_quantize_4bit(dtype, table)
    test_bitexact.test_dequantize_4bit(dtype, table)


@pytest.mark.usefixtures("bits_elsewhere")
@pytest.mark.parametrize("table", ["nf4", "fp4", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=testing.DTYPE_NAMES.get)
def test_every_16_bit_pattern(dtype: torch.dtype, table: str) -> None:
    test_bitexact.test_quantize_4bit_of_every_16_bit_pattern(dtype, table)


@pytest.mark.usefixtures("bits_elsewhere")
@dtypes
def test_ties_of_the_output_round_to_even(dtype: torch.dtype) -> None:
    test_bitexact.test_dequantize_rounds_ties_to_even(dtype)


@pytest.mark.usefixtures("bits_elsewhere")
@pytest.mark.parametrize("map_name", ["signed", "unsigned"])
@dtypes
def test_8bit_bit_for_bit(dtype: torch.dtype, map_name: str) -> None:
    test_bitexact.test_8bit(dtype, map_name)


@pytest.mark.usefixtures("bits_elsewhere")
def test_double_quantisation_bit_for_bit() -> None:
    test_bitexact.test_quantize_absmax()
    test_bitexact.test_the_mean_of_absmax_is_rounded_once()


def test_the_server_notices_what_a_kernel_must_not_do(emulated: backend.EmulatedTarget) -> None:
    """A buffer one element short ends in the unmapped page beside it."""
    flavour, isa = emulated.flavour, str(emulated.isa)
    x = torch.randn(4096)
    packed, absmax = torch.empty(2048, dtype=torch.uint8), torch.empty(64)
    server = backend.server(flavour, isa)
    sizes = {"x": 4 * 4096, "packed": 2048, "absmax": 4 * 64}
    for short in sizes:
        cut = {name: size - 4 * (name == short) for name, size in sizes.items()}
        arguments = [
            *(backend._in(x.data_ptr(), cut["x"]), 0, 4096, 0, 0, 64),
            backend._out(packed.data_ptr(), cut["packed"]),
            *(backend._out(absmax.data_ptr(), cut["absmax"]), 1),
        ]
        with pytest.raises(backend.ServerError, match="ended with status"):
            server.call("quantize_4bit", "after", False, *arguments)
        backend.close(isa)
        server = backend.server(flavour, isa)
