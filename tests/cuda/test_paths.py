"""Which path a CUDA matmul takes, and that every path gives the contract's results (emulated)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from lab import ROOT
from lab.cuda.emulator import backend, build
from lab.cuda.ways import expected_paths
from qkern import testing
from qkern.backends import _cuda_matmul, _cuda_paths
from qkern.backends._backend import Product
from qkern.backends._compiled import product_numbers
from qkern.backends._cuda_paths import PATHS, Limits, Matmul, Way
from qkern.testing import DTYPES, OPS, Case
from qkern.weight import Weight

needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="the emulator needs g++ or CXX"
)
AMPERE = Limits(80, 108, 40 << 20)
HOPPER = Limits(90, 132, 50 << 20)
MATMULS = ("linear_4bit", "linear_4bit_dx")
# (rows, N, K): one slice and several, whole and short ones, K that no 128-bit load divides.
SHAPES = ((1, 96, 256), (7, 300, 64), (21, 260, 416), (65, 136, 320), (9, 70, 131), (5, 515, 96))
# A tile of 256 rows, more tiles of the contraction than are under way at once, and half of one.
HOPPER_SHAPES = (*SHAPES, (130, 264, 160), (257, 136, 1056), (9, 2056, 96))


def forced_cases() -> list[object]:
    formats = (("nf4", True), ("fp4", False))
    found = []
    for name in MATMULS:
        for index, shape in enumerate(HOPPER_SHAPES):
            for dtype in DTYPES:
                format, double_quant = formats[index % 2]
                bias = name == "linear_4bit" and index % 3 != 1
                case = Case(shape, dtype, 32, format, double_quant=double_quant, bias=bias)
                call = Matmul(name.endswith("dx"), dtype, *shape)
                paths = expected_paths(call, AMPERE.capability) if index < len(SHAPES) else ()
                paths += ("wgmma",) * ("wgmma" in expected_paths(call, HOPPER.capability))
                found += [
                    pytest.param(name, case, path, id=f"{name}-{path}-{case}") for path in paths
                ]
    return found


@needs_compiler
@pytest.mark.parametrize(("name", "case", "path"), forced_cases())
def test_every_path_meets_the_error_bound(
    name: str, case: Case, path: str, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so small a workspace that `gemm` takes several slices."""
    device = HOPPER if path == "wgmma" else AMPERE
    schedule = replace(backend.SCHEDULES[4], capability=device.capability)
    target = backend.EmulatedTarget(library, schedule)
    limits = replace(device, l2_bytes=1 << 16, workspace_bytes=1 << 15)
    monkeypatch.setattr(_cuda_matmul, "device_limits", lambda _: limits)
    monkeypatch.setenv("QKERN_CUDA_PATH", path)
    taken = []
    for way in ("_fused", "_slices_by_gemm"):
        original = getattr(_cuda_matmul, way)

        def record(*args: Any, original=original, way: str = way) -> None:  # type: ignore[no-untyped-def]
            taken.append(args[2].path if way == "_fused" else "gemm")
            original(*args)

        monkeypatch.setattr(_cuda_matmul, way, record)
    testing.check(OPS[name], case, target, "cpu")
    assert set(taken) == {path}


@needs_compiler
@pytest.mark.parametrize("whole", [False, True], ids=["sliced", "whole"])
@pytest.mark.parametrize("name", MATMULS)
@pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
def test_gemm_takes_memory_for_one_slice_and_no_more(
    name: str, dtype: torch.dtype, whole: bool, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One workspace within its limit, whatever the weight's size."""
    target = backend.EmulatedTarget(library, backend.SCHEDULES[0])
    dense = 512 * 768 * dtype.itemsize
    limits = replace(AMPERE, workspace_bytes=dense if whole else 1 << 19)
    monkeypatch.setattr(_cuda_matmul, "device_limits", lambda _: limits)
    monkeypatch.setenv("QKERN_CUDA_PATH", "gemm")
    sizes = []
    empty = torch.empty

    def recorded(*args: object, **keywords: object) -> torch.Tensor:
        result = empty(*args, **keywords)
        sizes.append(result.nbytes)
        return result

    inputs = OPS[name].make_inputs(
        Case((3, 512, 768), dtype, double_quant=True), torch.device("cpu"), torch.Generator()
    )
    with target.activate():
        monkeypatch.setattr(torch, "empty", recorded)
        OPS[name].run(inputs)
    outputs = 3 * (512 if name == "linear_4bit" else 768) * dtype.itemsize
    assert len(sizes) == 2
    assert outputs in sizes
    assert max(sizes) <= limits.workspace_bytes
    assert (max(sizes) == dense) == whole


SIZES = ((14336, 4096), (4096, 14336), (129, 128), (1, 1 << 20), (576, 1536), (53248, 16384))


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("rows", [1, 512, 1025, 8192])
def test_slices_cover_w_once_and_fit(dx: bool, rows: int) -> None:
    limit = 256 << 20
    assert AMPERE.workspace_bytes == limit
    for n, k in SIZES:
        slices = _cuda_paths.slices_of(Matmul(dx, torch.bfloat16, rows, n, k), AMPERE)
        sliced, other = (k, n) if dx else (n, k)
        assert slices[0][0] == 0
        assert slices[-1][1] == sliced
        assert all(a[1] == b[0] for a, b in itertools.pairwise(slices))
        # No more than are needed, nearly of one size.
        assert len(slices) <= max(2, -(-n * k * 2 // limit))
        for begin, end in slices:
            assert begin % 128 == 0
            fits = (end - begin) * other * 2 <= limit
            assert fits or end - begin <= 128


def test_when_w_is_whole() -> None:
    """With few rows, or where more than two slices would be needed to stay in the cache."""
    w = 14336 * 4096 * 2
    half, third = (replace(AMPERE, l2_bytes=2 * w // parts) for parts in (2, 3))
    for dx in (False, True):
        call = Matmul(dx, torch.bfloat16, 1024, 14336, 4096)
        for limits, rows, count in ((half, 1024, 1), (half, 1025, 2), (third, 1025, 1)):
            assert len(_cuda_paths.slices_of(replace(call, rows=rows), limits)) == count
    for device, rows in (("H200", 512), ("T4", 1 << 20)):
        call = Matmul(False, torch.float16, rows, 14336, 4096)
        assert _cuda_paths.slices_of(call, PRIORS[device][0]) == ((0, 14336),)


def test_the_model_of_the_vendors_gemm() -> None:
    """Whole waves of tiles, and W to memory and back where the cache does not hold it."""
    call = Matmul(False, torch.bfloat16, 64 * 108, 8192, 4096)
    clocks = [_cuda_paths._gemm_clocks(n, 4096, call, AMPERE) for n in (2048, 2047, 1793, 4096)]
    assert clocks[0] == clocks[1] == clocks[2] == clocks[3] / 2
    peak = call.rows * 2048 * 4096 / (4 * AMPERE.processors * 256)
    assert clocks[0] == pytest.approx(peak / 0.8)
    # One tile that is split in four keeps four processors busy.
    few = _cuda_paths._gemm_clocks(128, 4096, replace(call, rows=1), AMPERE)
    assert few == pytest.approx(64 * 128 * 1024 / (4 * 256) / 0.7 + 2000)
    model, call = _cuda_paths.modelled_clocks, replace(call, rows=64)
    assert model("gemm", call, AMPERE) > 1.5 * model(
        "gemm", call, replace(AMPERE, l2_bytes=1 << 30)
    )


modelled = _cuda_paths.modelled_clocks


def choose(call: Matmul, limits: Limits) -> str:
    """The path of a call, on a device of which only the limits are known."""
    ways = [Way(path) for path in expected_paths(call, limits.capability)]
    return (_cuda_paths.forced(call, ways) or _cuda_paths.best(call, limits, ways)).path


@needs_compiler
@pytest.mark.parametrize("capability", [70, 75, 80, 90, 100, 120])
def test_the_kernels_answer_which_paths_there_are(library: ModuleType, capability: int) -> None:
    """And what each takes: a workspace where the contraction is split, of a part for each."""
    schedule = replace(backend.SCHEDULES[0], capability=capability)
    sizes = ((64, 96), (4096, 14336), (67, 128), (64, 48), (12, 64), (8, 1 << 29), (8, 3 << 28))
    flags = (False, True)
    with backend.EmulatedTarget(library, schedule).activate():
        limits = _cuda_matmul.device_limits(library)
        assert limits.capability == capability
        for dx, dtype, m, (n, k), invariant, aligned in itertools.product(
            flags, DTYPES, (1, 9, 500), sizes, flags, flags
        ):
            call = Matmul(dx, dtype, m, n, k, invariant, aligned)
            ways, best = _cuda_matmul._ranked(library, call, limits)
            assert tuple(way.path for way in ways) == expected_paths(call, capability)
            assert best in ways
            for way in ways:
                rows = min(m, 64) if way.path == "vector" else m
                part = 4 * rows * (k if dx else n)
                assert way.workspace_bytes == (0 if way.parts == 1 else way.parts * part)
                assert way.parts == 1 or way.path in ("vector", "mma", "wgmma")


@needs_compiler
def test_few_rows_of_a_square_layer_start_one_kernel(library: ModuleType) -> None:
    with backend.EmulatedTarget(library, backend.SCHEDULES[0]).activate():
        limits = _cuda_matmul.device_limits(library)
        for m in (1, 2, 4, 8, 16):
            call = Matmul(False, torch.bfloat16, m, 4096, 4096)
            ways, _ = _cuda_matmul._ranked(library, call, limits)
            parts = {way.path: way.parts for way in ways}
            assert parts["vector"] == parts["mma"] == 1


@needs_compiler
@pytest.mark.parametrize("path", ["vector", "mma", "tiled", "wgmma"])
def test_products_without_terms_are_the_bias(path: str, library: ModuleType) -> None:
    """As C++ is asked for them: Python never comes so far with a weight of no columns."""
    x, bias = torch.full((3, 8), torch.nan).bfloat16(), torch.randn(5).bfloat16()
    out = torch.full((3, 5), torch.nan).bfloat16()
    packed, absmax = torch.zeros(16, dtype=torch.uint8), torch.full((1,), torch.nan)
    weight = Weight(packed, absmax, None, None, None, "nf4", 64)
    product = Product(False, x, 3, 8, weight, 5, 0, bias, out, batch_invariant=False)
    schedule = replace(backend.SCHEDULES[0], capability=90)
    with backend.EmulatedTarget(library, schedule).activate():
        library.cuda_linear_4bit(*product_numbers(product), PATHS.index(path), None, 0)
    testing.assert_bitwise(out, bias.expand(3, 5))


@needs_compiler
def test_a_shape_that_came_before_asks_for_no_paths(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = OPS["linear_4bit"].make_inputs(
        Case((3, 64, 96)), torch.device("cpu"), torch.Generator()
    )
    asked = []
    original = library.cuda_linear_paths
    monkeypatch.setattr(
        library, "cuda_linear_paths", lambda *args: asked.append(args) or original(*args)
    )
    _cuda_matmul._ranked.cache_clear()
    with backend.EmulatedTarget(library, backend.SCHEDULES[0]).activate():
        for _ in range(3):
            OPS["linear_4bit"].run(inputs)
    assert len(asked) == 1


# Limits of a device, and up to how many rows bitsandbytes 0.50.2 takes its kernel of the kind of
# `mma` for a layer that has three blocks of 64 columns for each of its processors.
PRIORS = {
    "T4": (Limits(75, 40, 4 << 20), 64),
    "A100": (Limits(80, 108, 40 << 20), 128),
    "RTX 3090": (Limits(86, 82, 6 << 20), 128),
    "RTX 4090": (Limits(89, 128, 72 << 20), 256),
    "H100": (Limits(90, 132, 50 << 20), 64),
    "H200": (Limits(90, 132, 60 << 20), 64),
    "B200": (Limits(100, 148, 126 << 20), 32),
    "RTX 5090": (Limits(120, 170, 96 << 20), 256),
}


@pytest.mark.parametrize("device", PRIORS)
@pytest.mark.parametrize("shape", [(28672, 8192), (53248, 16384), (32768, 4096)])
def test_crossovers_are_near_what_others_measured(device: str, shape: tuple[int, int]) -> None:
    limits, prior = PRIORS[device]
    assert prior / 2 <= crossover(limits, shape) <= 2 * prior


def crossover(limits: Limits, shape: tuple[int, int]) -> int:
    """The number of rows up to which W is decoded in registers; with more, always by `gemm`."""
    call = Matmul(False, torch.float16, 1, *shape)
    fused = [m for m in range(1, 1025) if choose(replace(call, rows=m), limits) != "gemm"]
    assert fused == list(range(1, len(fused) + 1))
    return len(fused)


def test_the_documented_crossovers_are_the_models() -> None:
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    rows = {row[1].strip(): row[2:-1] for line in lines if (row := line.split("|"))[2:]}
    devices = next(row for row in rows.values() if row[0].strip() == "T4")
    found = rows["qkern takes `vector` or `mma` forward, 28672 × 8192"]
    for names, number in zip(devices, found, strict=True):
        for name in names.strip().split(", "):
            assert crossover(PRIORS[name][0], (28672, 8192)) == int(number)


def test_choices_of_the_model() -> None:
    """The order that the ways must come in as rows grow, and what no model may overrule."""
    large = Matmul(False, torch.bfloat16, 1, 4096, 14336)
    for capability in (80, 86, 89, 90, 100, 120):
        limits = replace(AMPERE, capability=capability)
        order = [choose(replace(large, rows=rows), limits) for rows in range(1, 4097, 7)]
        assert order[0] == "vector"
        assert [PATHS.index(path) for path in order] == sorted(map(PATHS.index, order))
        assert "mma" in order
        assert {"tiled", "wgmma"}.isdisjoint(order)
    assert choose(replace(large, rows=2048), replace(AMPERE, capability=90)) == "gemm"
    # Without tensor cores for the dtype there is no mma.
    for dtype, capability in ((torch.float32, 90), (torch.bfloat16, 75)):
        limits = replace(AMPERE, capability=capability)
        for rows in (1, 8, 64, 512):
            assert choose(replace(large, dtype=dtype, rows=rows), limits) != "mma"
    # What has not run on a GPU is not chosen, however fast it is by the model.
    wgmma = modelled("wgmma", replace(large, rows=256), HOPPER)
    assert wgmma < min(modelled(p, replace(large, rows=256), HOPPER) for p in ("mma", "gemm"))
    # Batch invariance: one way, whatever the number of rows.
    for dx in (False, True):
        call = replace(large, dx=dx, batch_invariant=True)
        assert len({choose(replace(call, rows=m), AMPERE) for m in (1, 9, 4096)}) == 1


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("wmma", Matmul(False, torch.float16, 4, 64, 64)),
        ("mma", Matmul(False, torch.float32, 4, 64, 64)),
        ("mma", Matmul(False, torch.float16, 4, 64, 65)),
        ("wgmma", Matmul(False, torch.float16, 4, 64, 64)),
        ("vector", Matmul(True, torch.float16, 4, 64, 64)),
        ("gemm", Matmul(False, torch.float16, 4, 64, 64, batch_invariant=True)),
    ],
)
def test_a_forced_path_that_cannot_is_an_error(
    path: str, call: Matmul, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QKERN_CUDA_PATH", path)
    with pytest.raises(ValueError, match=f"QKERN_CUDA_PATH: got '{path}'; takes .*tiled"):
        choose(call, AMPERE)


@needs_compiler
@pytest.mark.parametrize("path", ["mma", "tiled", "vector", "wgmma", "gemm"])
def test_codes_that_are_not_there_have_no_value(
    path: str, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tile that is cut short: an infinite product would make a NaN of the zeros beside it."""
    codebook = torch.linspace(-0.5, 0.25, 16)
    codebook[15] = 1.0  # that no weight has: with this scale, infinite in float16
    packed, absmax = torch.full((40 * 96 // 2,), 0xEE, dtype=torch.uint8), torch.full((120,), 1e5)
    x = torch.randn(5, 96).half() * 1e-3
    monkeypatch.setenv("QKERN_CUDA_PATH", path)
    schedule = replace(backend.SCHEDULES[0], capability=90)
    with backend.EmulatedTarget(library, schedule).activate():
        y = torch.ops.qkern.linear_4bit(x, packed, absmax, None, None, codebook, "custom", 32, 40)
    weight = (codebook[14] * 1e5).half().double()
    assert weight.isfinite()
    expected = (x.double().sum(1, keepdim=True) * weight).half().expand(5, 40)
    torch.testing.assert_close(y, expected)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_near_the_end_of_float32(
    rows: int, dtype: torch.dtype, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of products that are not scaled yet overflow where results are far from it."""
    w = torch.full((67, 128), 1e-3)
    packed, absmax = torch.ops.qkern.quantize_4bit(w, "nf4", 64, None)
    x = torch.zeros(rows, 128)
    x[:, [0, 1, 8]] = 3e38
    x[-1, 5] = torch.inf if rows == 7 else 0
    monkeypatch.setenv("QKERN_CUDA_PATH", "vector")
    target = backend.EmulatedTarget(library, backend.SCHEDULES[4])
    with target.activate():
        y = torch.ops.qkern.linear_4bit(
            x.to(dtype), packed, absmax, None, None, None, "nf4", 64, 67
        )
    expected = (x.to(dtype).double() @ w.double().t()).to(dtype)
    torch.testing.assert_close(y, expected)


@needs_compiler
@pytest.mark.parametrize(
    ("path", "capability", "shape", "dtype", "taken"),
    [
        ("mma", 80, (5, 64, 96), torch.float32, "float16 from sm_75"),
        ("mma", 80, (5, 64, 48), torch.bfloat16, "K % 32 == 0"),
        ("wgmma", 90, (5, 64, 96), torch.float32, "float16 and bfloat16 on compute capability 9.0"),
        ("wgmma", 80, (5, 64, 96), torch.bfloat16, "float16 and bfloat16 on compute capability"),
        ("wgmma", 100, (5, 64, 96), torch.bfloat16, "float16 and bfloat16 on compute capability"),
        ("wgmma", 90, (5, 64, 48), torch.bfloat16, "K % 32 == 0"),
    ],
)
def test_kernels_refuse_what_the_tensor_cores_cannot_take(
    path: str,
    capability: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    taken: str,
    library: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher checks again: a wrong choice must not read out of step."""
    schedule = replace(backend.SCHEDULES[0], capability=capability)
    target = backend.EmulatedTarget(library, schedule)
    case = Case(shape, dtype)
    inputs = OPS["linear_4bit"].make_inputs(case, torch.device("cpu"), torch.Generator())
    monkeypatch.setattr(_cuda_matmul, "choose", lambda *_: Way(path))
    with target.activate(), pytest.raises(RuntimeError, match=f"{path}.*: takes {taken}"):
        OPS["linear_4bit"].run(inputs)
