"""Which path a CUDA matmul takes, and that every path gives the contract's results (emulated)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from lab.cuda.emulator import backend, build
from lab.cuda.ways import expected_paths
from qkern import testing
from qkern.backends import _cuda_matmul, _cuda_paths
from qkern.backends._cuda_paths import PATHS, Limits, Matmul, Way
from qkern.testing import DTYPES, OPS, Case

needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="the emulator needs g++ or CXX"
)
AMPERE = Limits(80, 108, 40 << 20)
MATMULS = ("linear_4bit", "linear_4bit_dx")
# (rows, N, K): one slice and several, whole and short ones, K that no 128-bit load divides.
SHAPES = ((1, 96, 256), (7, 300, 64), (21, 260, 416), (65, 136, 320), (9, 70, 131), (5, 515, 96))


@pytest.fixture(scope="module")
def library() -> ModuleType:
    """The module of the plain build."""
    return build.load(build.build("plain"))


def forced_cases() -> list[object]:
    formats = (("nf4", True), ("fp4", False))
    found = []
    for name in MATMULS:
        for index, shape in enumerate(SHAPES):
            for dtype in DTYPES:
                format, double_quant = formats[index % 2]
                bias = name == "linear_4bit" and index % 3 != 1
                case = Case(shape, dtype, 32, format, double_quant=double_quant, bias=bias)
                call = Matmul(name.endswith("dx"), dtype, *shape)
                found += [
                    pytest.param(name, case, path, id=f"{name}-{path}-{case}")
                    for path in expected_paths(call, AMPERE.capability)
                ]
    return found


@needs_compiler
@pytest.mark.parametrize(("name", "case", "path"), forced_cases())
def test_every_path_meets_the_error_bound(
    name: str, case: Case, path: str, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so small a cache that `gemm` takes several slices."""
    target = backend.EmulatedTarget(library, backend.SCHEDULES[4])
    monkeypatch.setattr(_cuda_matmul, "device_limits", lambda _: replace(AMPERE, l2_bytes=1 << 16))
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
@pytest.mark.parametrize("name", MATMULS)
@pytest.mark.parametrize("dtype", DTYPES, ids=testing.DTYPE_NAMES.get)
def test_gemm_takes_memory_for_one_slice_and_no_more(
    name: str, dtype: torch.dtype, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One workspace, within half of the cache, whatever the weight's size."""
    target = backend.EmulatedTarget(library, backend.SCHEDULES[0])
    limits = replace(AMPERE, l2_bytes=1 << 20)
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
    assert max(sizes) <= limits.l2_bytes // 2
    assert max(sizes) < 512 * 768 * dtype.itemsize


def test_slices_cover_w_once_and_fit() -> None:
    for dx in (False, True):
        for n, k in ((14336, 4096), (4096, 14336), (129, 128), (1, 1 << 20), (576, 1536)):
            call = Matmul(dx, torch.bfloat16, 512, n, k)
            slices = _cuda_paths.slices_of(call, AMPERE)
            sliced, other = (k, n) if dx else (n, k)
            assert slices[0][0] == 0
            assert slices[-1][1] == sliced
            assert all(a[1] == b[0] for a, b in itertools.pairwise(slices))
            for begin, end in slices:
                assert begin % 128 == 0
                fits = (end - begin) * other * 2 <= AMPERE.l2_bytes // 2
                assert fits or end - begin <= 128


def choose(call: Matmul, limits: Limits) -> str:
    """The path of a call, on a device of which only the limits are known."""
    ways = [Way(path) for path in expected_paths(call, limits.capability)]
    return (_cuda_paths.forced(call, ways) or _cuda_paths.best(call, limits, ways)).path


@needs_compiler
@pytest.mark.parametrize("capability", [70, 75, 80, 90])
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
                assert way.parts == 1 or way.path in ("vector", "mma")


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


def test_choices_of_the_model() -> None:
    """The order that the ways must come in as rows grow, and what no model may overrule."""
    large = Matmul(False, torch.bfloat16, 1, 4096, 14336)
    for capability in (80, 86, 89, 90, 100, 120):
        limits = replace(AMPERE, capability=capability)
        order = [choose(replace(large, rows=rows), limits) for rows in range(1, 4097, 7)]
        assert order[0] == "vector"
        assert [PATHS.index(path) for path in order] == sorted(map(PATHS.index, order))
        assert "mma" in order
        assert "tiled" not in order
    assert choose(replace(large, rows=2048), replace(AMPERE, capability=90)) == "gemm"
    # Without tensor cores for the dtype there is no mma.
    for dtype, capability in ((torch.float32, 90), (torch.bfloat16, 75)):
        limits = replace(AMPERE, capability=capability)
        for rows in (1, 8, 64, 512):
            assert choose(replace(large, dtype=dtype, rows=rows), limits) != "mma"
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
    ("shape", "dtype", "taken"),
    [
        ((5, 64, 96), torch.float32, "float16 from sm_75"),
        ((5, 64, 48), torch.bfloat16, "K % 32 == 0"),
    ],
)
def test_kernels_refuse_what_the_tensor_cores_cannot_take(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    taken: str,
    library: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher checks again: a wrong choice must not read out of step."""
    target = backend.EmulatedTarget(library, backend.SCHEDULES[0])
    case = Case(shape, dtype)
    inputs = OPS["linear_4bit"].make_inputs(case, torch.device("cpu"), torch.Generator())
    monkeypatch.setattr(_cuda_matmul, "choose", lambda *_: Way("mma"))
    with target.activate(), pytest.raises(RuntimeError, match=f"path mma: takes {taken}"):
        OPS["linear_4bit"].run(inputs)
