"""The AArch64 kernels, NEON and plain, under an emulator: correctness only, nothing is timed.

The server of `lab.neon` runs the sources of csrc/cpu, every buffer against an unmapped page.
All of it is slow: the server alone takes a minute to build.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lab.neon import backend, build
from qkern import testing
from qkern.testing import DTYPES, OPS, Case, Inputs, OpSpec, Target
from tests.ops import test_bitexact, test_conformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
isas = pytest.mark.parametrize("isa_name", backend.ISAS)
CPU = torch.device("cpu")

PARTS = 8  # of the table: a part is a test, so that several workers share the table


@pytest.fixture(scope="module", autouse=True)
def _servers() -> Iterator[None]:
    yield
    backend.close()


@pytest.fixture(params=backend.ISAS)
def emulated(request: pytest.FixtureRequest) -> Target:
    """A target for each instruction set."""
    return backend.EmulatedTarget(request.param)


def check_all(target: Target, part: int) -> None:
    for spec in OPS.values():
        for case in spec.cases[part::PARTS]:
            print(spec.id(case, target))  # the last one shown is the one that failed
            testing.check(spec, case, target)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("side", ["after", "before"])
def test_table_on_neon(side: str, part: int) -> None:
    check_all(backend.EmulatedTarget("neon", side), part)


@pytest.mark.parametrize("part", range(PARTS))
def test_table_on_scalar(part: int) -> None:
    check_all(backend.EmulatedTarget("scalar"), part)


def test_neon_is_there_and_the_best() -> None:
    assert backend.server("").available == ["scalar", "neon"]
    assert backend.server("").active == "neon"
    for isa in backend.ISAS:
        assert backend.server(isa).active == isa
    assert backend.server("avx2").active == "none"


SPECS = pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))


@SPECS
def test_every_op_runs_under_the_emulator(
    spec: OpSpec, emulated: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of this process's own kernels may answer in its place."""
    seen = []
    call = backend.Library._call

    def record(library: backend.Library, op: str, *arguments: object) -> None:
        seen.append(op)
        call(library, op, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backend.Library, "_call", record)
    shape = (3, 16, 64) if spec.multiplies else (3, 64)
    testing.check(spec, Case(shape), emulated)
    assert spec.name in seen


MATMULS = pytest.mark.parametrize(
    "spec", test_conformance.MATMULS, ids=[spec.name for spec in test_conformance.MATMULS]
)


@dtypes
def test_dequantize_into_out(emulated: Target, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "offset"):
        for double_quant in (False, True):
            test_conformance.test_dequantize_into_out(emulated, dtype, layout, double_quant, CPU)


@SPECS
def test_any_thread_count_gives_the_same_bits(spec: OpSpec, emulated: Target) -> None:
    test_conformance.test_any_thread_count_gives_the_same_bits(spec, emulated, torch.float32, CPU)


@dtypes
@MATMULS
def test_batch_invariant(spec: OpSpec, emulated: Target, dtype: torch.dtype) -> None:
    for shape in ((37, 130), (128, 512)):
        test_conformance.test_batch_invariant(spec, emulated, dtype, shape, CPU)


@dtypes
@MATMULS
def test_nonfinite_activations_stay_in_their_row(
    spec: OpSpec, emulated: Target, dtype: torch.dtype
) -> None:
    test_conformance.test_nonfinite_activations_stay_in_their_row(spec, emulated, dtype, CPU)


@MATMULS
def test_float16_overflow_is_infinite_not_wrapped(spec: OpSpec, emulated: Target) -> None:
    test_conformance.test_float16_overflow_is_infinite_not_wrapped(spec, emulated, CPU)


def test_a_huge_scale_and_gradient_spread_no_nan(emulated: Target) -> None:
    test_conformance.test_a_huge_scale_and_gradient_spread_no_nan(emulated, CPU)


def test_unchecked_nan_block_has_the_canonical_nan(emulated: Target) -> None:
    test_conformance.test_unchecked_nan_block_has_the_canonical_nan(emulated, CPU)


@dtypes
def test_every_nan_stays_nan(emulated: Target, dtype: torch.dtype) -> None:
    test_conformance.test_every_nan_stays_nan(emulated, dtype, CPU)


@pytest.mark.parametrize(
    ("spec", "shape"),
    test_conformance.SUBNORMAL_CASES,
    ids=[f"{s.name}-{shape[0]}" for s, shape in test_conformance.SUBNORMAL_CASES],
)
@isas
def test_flushing_subnormals_to_zero_changes_no_bits(
    spec: OpSpec, shape: tuple[int, ...], isa_name: str
) -> None:
    """FPCR.FZ as `torch.set_flush_denormal` sets it; the server sees that it is put back."""
    inputs = test_conformance.inputs_of(spec, Case(shape, values="special"), CPU)
    if spec in test_conformance.MATMULS:
        main = spec.main
        inputs[main] = torch.randn_like(inputs[main]) * 1e-39
    torch.set_num_threads(2)
    expected = test_conformance.run(spec, inputs, backend.EmulatedTarget(isa_name))
    assert all((result != 0).any() for result in expected if result.numel() > 1000)
    flushed = test_conformance.run(spec, inputs, backend.EmulatedTarget(isa_name, flush=True))
    for actual, wanted in zip(flushed, expected, strict=True):
        testing.assert_bitwise(actual, wanted)


@pytest.fixture
def bits_on_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_bitexact`'s comparison runs on both instruction sets here."""

    def compare(op: str, inputs: Inputs) -> None:
        expected = OPS[op].reference(inputs)
        for isa in backend.ISAS:
            target = backend.EmulatedTarget(isa)
            actual = test_conformance.run(OPS[op], inputs, target)
            for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
                testing.assert_bitwise(a, e, f"{op} result {index} on {target}")

    monkeypatch.setattr(test_bitexact, "compare_everywhere", compare)


@pytest.mark.usefixtures("bits_on_aarch64")
@pytest.mark.parametrize("table", ["nf4", "fp4", *testing.CODEBOOKS])
@dtypes
def test_codes_and_values_bit_for_bit(dtype: torch.dtype, table: str) -> None:
    """Values of every magnitude, and each decision point with its two neighbours."""
    test_bitexact.test_quantize_4bit(dtype, table)
    test_bitexact.test_dequantize_4bit(dtype, table)


@pytest.mark.usefixtures("bits_on_aarch64")
@pytest.mark.parametrize("table", ["nf4", "fp4", "unsorted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=testing.DTYPE_NAMES.get)
def test_every_16_bit_pattern(dtype: torch.dtype, table: str) -> None:
    test_bitexact.test_quantize_4bit_of_every_16_bit_pattern(dtype, table)


@pytest.mark.usefixtures("bits_on_aarch64")
@dtypes
def test_ties_of_the_output_round_to_even(dtype: torch.dtype) -> None:
    test_bitexact.test_dequantize_rounds_ties_to_even(dtype)


@pytest.mark.usefixtures("bits_on_aarch64")
@pytest.mark.parametrize("map_name", ["signed", "unsigned"])
@dtypes
def test_8bit_bit_for_bit(dtype: torch.dtype, map_name: str) -> None:
    test_bitexact.test_8bit(dtype, map_name)


@pytest.mark.usefixtures("bits_on_aarch64")
def test_double_quantisation_bit_for_bit() -> None:
    test_bitexact.test_quantize_absmax()
    test_bitexact.test_the_mean_of_absmax_is_rounded_once()


def test_the_server_notices_what_a_kernel_must_not_do() -> None:
    """A buffer one element short ends in the unmapped page beside it."""
    x = torch.randn(4096)
    packed, absmax = torch.empty(2048, dtype=torch.uint8), torch.empty(64)
    server = backend.server("neon")
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
        backend.close("neon")
        server = backend.server("neon")
