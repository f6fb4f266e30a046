"""Every op, on every backend and instruction set, against the reference: the op table's tests."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qkern import testing
from qkern.backends import cpu
from qkern.testing import DTYPES, OPS, Case, OpSpec, Target

MATMULS = tuple(spec for spec in OPS.values() if spec.comparison == "matmul")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
matmuls = pytest.mark.parametrize("spec", MATMULS, ids=[spec.name for spec in MATMULS])
all_ops = pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is not test_op:
        return
    found = testing.targets(metafunc.config.getoption("--device"))
    params = []
    for spec in OPS.values():
        # A missing target is skipped once for each op, not once for each case.
        for target in (t for t in found if t.reason):
            skip = pytest.mark.skip(reason=f"{target}: {target.reason}")
            params.append(
                pytest.param(spec, spec.cases[0], target, id=f"{spec.name}-{target}", marks=skip)
            )
        params += [
            pytest.param(spec, case, target, id=spec.id(case, target))
            for case in spec.cases
            for target in found
            if not target.reason
        ]
    metafunc.parametrize(("spec", "case", "on"), params)


def test_op(spec: OpSpec, case: Case, on: Target, device: torch.device) -> None:
    testing.check(spec, case, on, device)


def test_the_table_holds_every_op() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qkern::")}
    variants = {"qkern::dequantize_4bit_out"}
    assert names - variants == {f"qkern::{name}" for name in OPS}


def test_case_ids_are_unique() -> None:
    target = Target("cpu", "scalar")
    ids = [spec.id(case, target) for spec in OPS.values() for case in spec.cases]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(
    not os.environ.get("QKERN_REQUIRE_NATIVE"),
    reason="QKERN_REQUIRE_NATIVE is not set: a build without native kernels is allowed",
)
def test_scalar_and_the_best_instruction_set_run() -> None:
    available = {t.isa for t in testing.targets("cpu") if t.backend == "cpu" and not t.reason}
    assert "scalar" in available
    if platform.machine() == "x86_64":
        flags = set(Path("/proc/cpuinfo").read_text().split())
        if {"avx2", "fma", "f16c"} <= flags:
            assert "avx2" in available
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
            assert "avx512" in available
        if {"avx512f", "avx512_bf16", "avx512vbmi", "avx512_vnni"} <= flags:
            assert "avx512bf16" in available
    if platform.machine() in ("aarch64", "arm64"):
        assert "neon" in available


def inputs_of(spec: OpSpec, case: Case, device: torch.device) -> testing.Inputs:
    return spec.make_inputs(case, device, torch.Generator().manual_seed(1))


def run(spec: OpSpec, inputs: testing.Inputs, target: Target) -> tuple[Tensor, ...]:
    with target.activate():
        return spec.run(inputs)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double_quant"])
@pytest.mark.parametrize("layout", ["contiguous", "offset"])
@dtypes
def test_dequantize_into_out(
    target: Target, dtype: torch.dtype, layout: str, double_quant: bool, device: torch.device
) -> None:
    spec = OPS["dequantize_4bit"]
    inputs = inputs_of(spec, Case((31, 77), dtype, double_quant=double_quant), device)
    padded = torch.full((31 * 77 + 2,), 7.0, dtype=dtype, device=device)
    flat = padded[1:-1] if layout == "offset" else padded[:-2]
    with target.activate():
        torch.ops.qkern.dequantize_4bit_out(*inputs["weight"], flat.view(31, 77))
    testing.assert_bitwise(flat.view(31, 77), spec.reference(inputs)[0])
    assert (padded[-1:] == 7).all()
    assert layout == "contiguous" or padded[0] == 7


@all_ops
def test_same_call_gives_the_same_bits(spec: OpSpec, target: Target, device: torch.device) -> None:
    shape = (19, 130, 515) if spec.multiplies else (40_001,)
    inputs = inputs_of(spec, Case(shape, torch.float32, rank=9), device)
    first = run(spec, inputs, target)
    for _ in range(3):
        for again, before in zip(run(spec, inputs, target), first, strict=True):
            testing.assert_bitwise(again, before)


# Large enough that every backend gives work to each thread.
THREAD_SHAPES = {"flat": [(1 << 20,)], "matmul": [(1, 1030, 2050), (3, 530, 1026), (70, 515, 1030)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.DTYPE_NAMES.get)
@all_ops
def test_any_thread_count_gives_the_same_bits(
    spec: OpSpec, target: Target, dtype: torch.dtype, device: torch.device
) -> None:
    if target.backend == "reference" and spec.multiplies:
        pytest.skip("the reference multiplies with torch, which promises no order of summation")
    for shape in THREAD_SHAPES["matmul" if spec.multiplies else "flat"]:
        inputs = inputs_of(spec, Case(shape, dtype, double_quant=True, rank=9), device)
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(spec, inputs, target))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                testing.assert_bitwise(a, b)


@pytest.mark.parametrize("weight_shape", [(37, 130), (128, 512)], ids=["37x130", "128x512"])
@dtypes
@matmuls
def test_batch_invariant(
    spec: OpSpec,
    target: Target,
    dtype: torch.dtype,
    weight_shape: tuple[int, int],
    device: torch.device,
) -> None:
    """A row's bits do not depend on how many rows come with it, nor on which place it has."""
    case = Case((300, *weight_shape), dtype, double_quant=True, batch_invariant=True, rank=9)
    inputs = inputs_of(spec, case, device)
    (whole,) = run(spec, inputs, target)
    for count in (1, 2, 3, 4, 6, 8, 13, 16, 17, 33, 64, 129):
        for start in (0, 300 - count):
            (part,) = run(spec, spec.rows(inputs, slice(start, start + count)), target)
            testing.assert_bitwise(part, whole[start : start + count], f"rows {start}+{count}")


@dtypes
@matmuls
def test_nonfinite_activations_stay_in_their_row(
    spec: OpSpec, target: Target, dtype: torch.dtype, device: torch.device
) -> None:
    """Each NaN and infinity reaches all results of its row, as in a dense matmul, and no other."""
    main = spec.main
    inputs = inputs_of(spec, Case((40, 37, 130), dtype, format="fp4"), device)
    (clean,) = run(spec, inputs, target)
    x = inputs[main].clone()
    x[3, -1], x[17, 5], x[39, 0] = torch.nan, torch.inf, -torch.inf
    (y,) = run(spec, inputs | {main: x}, target)

    weight = spec.exact_weight(inputs, Case((40, 37, 130)))
    dense = x.double() @ weight.mT.double()
    touched = torch.tensor([3, 17, 39], device=device)
    testing.assert_bitwise(y[touched].double(), dense[touched])
    untouched = torch.ones(40, dtype=torch.bool, device=device)
    untouched[touched] = False
    testing.assert_bitwise(y[untouched], clean[untouched])


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
@pytest.mark.parametrize("cols", [96, 416, 576])
@matmuls
def test_a_nonfinite_scale_stays_in_its_block(
    spec: OpSpec, target: Target, cols: int, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """It reaches its row of the weight (forward) or its columns (dx), and no other result."""
    forward = not spec.input_gradient
    blocks = cols // 32
    inputs = inputs_of(spec, Case((rows, 37, cols), dtype, block_size=32, rank=9), device)
    (clean,) = run(spec, inputs, target)
    for value in (torch.nan, torch.inf):
        for row, block in ((5, 0), (6, blocks - 1), (36, blocks - 1)):
            absmax = inputs["weight"].absmax.clone()
            absmax[row * blocks + block] = value
            weight = inputs["weight"]._replace(absmax=absmax)
            (y,) = run(spec, inputs | {"weight": weight}, target)
            touched = torch.zeros(y.shape[1], dtype=torch.bool, device=device)
            touched[row if forward else slice(32 * block, 32 * block + 32)] = True
            assert not y[:, touched].isfinite().any()
            testing.assert_bitwise(y[:, ~touched], clean[:, ~touched], f"{value} in {row}, {block}")


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0, 3), (1, 1, 1, 5)], ids=str)
@matmuls
def test_any_leading_dimensions(
    spec: OpSpec, target: Target, lead: tuple[int, ...], device: torch.device
) -> None:
    main, inner = spec.main, 37 if spec.input_gradient else 130
    rows = max(1, int(torch.Size(lead).numel()))
    inputs = inputs_of(spec, Case((rows, 37, 130), rank=3), device)
    (flat,) = run(spec, inputs, target)
    part = spec.rows(inputs, slice(torch.Size(lead).numel()))
    (y,) = run(spec, part | {main: part[main].reshape(*lead, inner)}, target)
    assert y.shape == (*lead, 167 - inner)
    testing.assert_bitwise(y.flatten(), flat[: torch.Size(lead).numel()].flatten())


@matmuls
def test_float16_overflow_is_infinite_not_wrapped(
    spec: OpSpec, target: Target, device: torch.device
) -> None:
    main = spec.main
    inputs = inputs_of(spec, Case((5, 64, 64), torch.float16), device)
    inputs[main] = torch.full_like(inputs[main], 60_000.0)
    packed = torch.full_like(inputs["weight"].packed, 0xFF)
    inputs["weight"] = inputs["weight"]._replace(packed=packed)
    (y,) = run(spec, inputs, target)
    assert (y == torch.inf).all()


def test_a_huge_scale_and_gradient_spread_no_nan(target: Target, device: torch.device) -> None:
    """Codes of zero give zero although scale times gradient would overflow."""
    for rows in (1, 9):
        inputs = inputs_of(OPS["linear_4bit_dx"], Case((rows, 8, 64)), device)
        packed, absmax = inputs["weight"][:2]
        inputs["weight"] = inputs["weight"]._replace(
            packed=torch.full_like(packed, 0x77), absmax=torch.full_like(absmax, 2.0**70)
        )
        inputs["dy"] = torch.full_like(inputs["dy"], 2.0**60)
        (dx,) = run(OPS["linear_4bit_dx"], inputs, target)
        assert (dx == 0).all()


def subnormal_inputs(spec: OpSpec, shape: tuple[int, ...]) -> testing.Inputs:
    inputs = inputs_of(spec, Case(shape, values="special", rank=9), torch.device("cpu"))
    if spec in MATMULS:
        for name in {spec.main, "left"} & inputs.keys():
            inputs[name] = torch.randn_like(inputs[name]) * 1e-39
    return inputs


SUBNORMAL_CASES = [
    *((spec, (300_001,)) for spec in OPS.values() if spec.comparison == "bitwise"),
    *((spec, (rows, 300, 384)) for spec in MATMULS for rows in (1, 21)),
]


@pytest.mark.parametrize(
    ("spec", "shape"), SUBNORMAL_CASES, ids=[f"{s.name}-{shape[0]}" for s, shape in SUBNORMAL_CASES]
)
def test_flushing_subnormals_to_zero_changes_no_bits(
    spec: OpSpec, shape: tuple[int, ...], isa: str
) -> None:
    """`torch.set_flush_denormal` holds for the calling thread alone: kernels must not heed it."""
    inputs = subnormal_inputs(spec, shape)
    torch.set_num_threads(2)
    expected = spec.run(inputs)
    assert all((result != 0).any() for result in expected if result.numel() > 1000)
    try:
        assert torch.set_flush_denormal(True)
        flushed = spec.run(inputs)
    finally:
        torch.set_flush_denormal(False)
    for actual, wanted in zip(flushed, expected, strict=True):
        testing.assert_bitwise(actual, wanted)


def test_unchecked_nan_block_has_the_canonical_nan(target: Target, device: torch.device) -> None:
    """Bits 0x7fc00000: every backend writes the same file for the same input."""
    for dtype in DTYPES:
        for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            x = torch.randn(70, device=device).to(dtype)
            x[66] = bad
            with target.activate():
                _, absmax = torch.ops.qkern.quantize_4bit(x, "nf4", 64, None)
            assert absmax.view(torch.int32)[1].item() == 0x7FC00000
            assert absmax[0].isfinite()


@dtypes
def test_every_nan_stays_nan(target: Target, dtype: torch.dtype, device: torch.device) -> None:
    """A NaN's payload, all ones say, must not be rounded up into a number."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7FC00000], dtype=torch.int32)
    for op, block_size in (("dequantize_4bit", 64), ("dequantize_8bit", 256)):
        inputs = inputs_of(OPS[op], Case((5, block_size), dtype, block_size), device)
        absmax = bits.view(torch.float32).to(device)
        if "weight" in inputs:
            inputs["weight"] = inputs["weight"]._replace(absmax=absmax)
        else:
            inputs["absmax"] = absmax
        (out,) = run(OPS[op], inputs, target)
        assert out.isnan().all(), op


def test_poison_reaches_the_native_outputs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that do nothing, every op returns the poison: no unwritten element can pass."""
    from qkern import _C

    for name in OPS:
        monkeypatch.setattr(_C, name, lambda *arguments: None)
    monkeypatch.setattr(cpu, "_functions", {})  # those found before
    # These ask torch for the result as everyone does.
    monkeypatch.setattr(cpu, "fast", {})
    assert torch.ones(2).new_empty(3, 16).isnan().all()
    for spec in OPS.values():
        if spec.writes:  # allocates nothing
            continue
        shape = (3, 16, 64) if spec.multiplies else (3, 64)
        for result in spec.run(inputs_of(spec, Case(shape), torch.device("cpu"))):
            poison = result.isnan() if result.is_floating_point() else result == 255
            assert poison.all(), spec.name


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double_quant"])
def test_floats_may_be_integers_with_their_bits(
    target: Target, double_quant: bool, device: torch.device
) -> None:
    """As modules hold scales: int32, with codes of two dimensions and an offset of one or two."""
    spec = OPS["linear_4bit"]
    case = Case((3, 37, 130), format="custom", codebook="unsorted", double_quant=double_quant)
    inputs = inputs_of(spec, case, device)
    expected = run(spec, inputs, target)[0]
    weight = inputs["weight"]
    bits = {
        name: value.view(torch.int32)
        for name, value in weight._asdict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    for offset_shape in ((), (1,), (1, 1)):
        held = weight._replace(packed=weight.packed.view(-1, 1), **bits)
        if double_quant:
            held = held._replace(nested_offset=held.nested_offset.view(offset_shape))
        testing.assert_bitwise(run(spec, inputs | {"weight": held}, target)[0], expected)


def test_codes_of_scales_are_not_taken_for_bits(target: Target, device: torch.device) -> None:
    """Double-quantised scales in a wider integer are wrong, whatever their values."""
    inputs = inputs_of(OPS["linear_4bit"], Case((3, 37, 130), double_quant=True), device)
    wide = inputs["weight"]._replace(absmax=inputs["weight"].absmax.int())
    with pytest.raises(TypeError, match=r"absmax: got torch.int32; takes torch.uint8"):
        run(OPS["linear_4bit"], inputs | {"weight": wide}, target)
