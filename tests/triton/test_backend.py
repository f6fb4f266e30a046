"""The Triton backend in the package: chosen where it should be, under autograd and compile."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from setuptools import find_packages

import qkern
from lab import ROOT
from lab.processes import fresh_python
from lab.triton import semantics
from qkern import backends, formats, reference
from qkern._tables import map_on
from qkern.backends import cuda, triton

needs_triton = pytest.mark.skipif(
    triton.missing_reason() is not None, reason=str(triton.missing_reason())
)


def python(code: str, **variables: str) -> str:
    """What a fresh interpreter prints; anything on stderr is a failure."""
    done = fresh_python("-c", code, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_kernels_are_imported_when_asked_for() -> None:
    """Torch imports Triton itself, where it is installed."""
    used = "qkern.quantize_4bit(torch.randn(64)); "
    code = f"import sys, torch, qkern; {used} print('qkern.triton_kernels' in sys.modules)"
    assert python(code) == "False\n"


def test_without_triton_the_report_says_why() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; "
        "from qkern import backends; print(backends.available('cuda')['triton'])"
    )
    assert python(code).startswith("Triton cannot be imported: ")
    code = code.replace("print(", "from qkern import env; env.main(['--json']); (")
    found = json.loads(python(code))["devices"]["cuda"]["backends"]["triton"]
    assert found.startswith("Triton cannot be imported: ")


@needs_triton
def test_cuda_tensors_take_it_where_the_native_kernels_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("QKERN_BACKEND", raising=False)
    monkeypatch.setattr(cuda, "missing_reason", lambda: "not built")
    monkeypatch.setattr(backends, "selected", {})
    assert backends.select(torch.device("cuda")) is triton
    monkeypatch.setattr(cuda, "missing_reason", lambda: None)
    monkeypatch.setattr(backends, "selected", {})
    assert backends.select(torch.device("cuda")) is cuda


@needs_triton
def test_forced_it_takes_cuda_tensors_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERN_BACKEND", "triton")
    monkeypatch.setattr(backends, "selected", {})
    assert backends.select(torch.device("cuda")) is triton
    with pytest.raises(RuntimeError, match="'triton' does not take cpu tensors"):
        backends.select(torch.device("cpu"))


def test_the_kernels_are_part_of_the_package() -> None:
    assert "qkern.triton_kernels" in find_packages(str(ROOT), include=["qkern", "qkern.*"])


@needs_triton
def test_tables_are_those_of_formats() -> None:
    from qkern.triton_kernels import codec

    cpu = torch.device("cpu")
    assert codec.code_table("nf4", cpu).tolist() == list(formats.NF4_CODES)
    assert codec.code_table("fp4", cpu).tolist() == list(formats.FP4_CODES)
    assert map_on("signed", cpu).tolist() == list(formats.DYNAMIC_MAP_SIGNED)
    assert map_on("unsigned", cpu).tolist() == list(formats.DYNAMIC_MAP_UNSIGNED)
    for name, expected in (
        ("signed", formats.DYNAMIC_THRESHOLDS_SIGNED),
        ("unsigned", formats.DYNAMIC_THRESHOLDS_UNSIGNED),
    ):
        thresholds = codec.byte_thresholds(formats.map_tensor(name))
        assert thresholds.tolist() == [*expected, float("inf")]
        assert codec.dynamic_thresholds(name, cpu).tolist() == thresholds.tolist()


@needs_triton
def test_a_table_by_value_is_the_table() -> None:
    """What a CUDA graph captures instead of a copy from the host."""
    from qkern.triton_kernels import adamw_step

    words = [0, 1, -1, (1 << 63) - 1, (1 << 53) + 1, -(1 << 63), *range(200)]
    cpu = torch.device("cpu")
    for made in (adamw_step._by_value(words, cpu), adamw_step._on_device(words, cpu)):
        assert made.dtype == torch.int64
        assert made.tolist() == words


def emulated(test: Callable[..., None]) -> Callable[..., None]:
    """A test with every op on the Triton kernels under ttsem."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        with semantics.SemanticsTarget(semantics.DEVICES[0]).activate():
            test(*args, **kwargs)

    missing = triton.missing_reason() or importlib.util.find_spec("ttsem") is None
    needs_both = pytest.mark.skipif(bool(missing), reason="needs triton and ttsem")
    return needs_both(semantics.in_own_process(run))


@pytest.fixture
def qw() -> qkern.QuantizedTensor:
    return qkern.quantize_4bit(torch.randn(40, 96), double_quant=True)


@emulated
def test_gradients(qw: qkern.QuantizedTensor) -> None:
    x = torch.randn(5, 96, requires_grad=True)
    a = torch.randn(4, 96, requires_grad=True)
    b = torch.randn(40, 4, requires_grad=True)
    y = qkern.lora_linear(x, qw, a, b, scaling=0.5)
    y.square().sum().backward()
    found = y.detach(), x.grad, a.grad, b.grad
    weight = qw.dequantize() + 0.5 * b.detach() @ a.detach()
    dense = x.detach() @ weight.T
    torch.testing.assert_close(found[0], dense)
    torch.testing.assert_close(found[1], 2 * dense @ weight, rtol=1e-4, atol=1e-3)
    assert all(grad.count_nonzero() for grad in found[2:])


def adamw_lists() -> tuple[list[torch.Tensor], ...]:
    """Two parameters with their gradients and 8-bit moments."""
    floats = [torch.randn(n) for n in (300, 5)]
    codes = [torch.zeros(n, dtype=torch.uint8) for n in (300, 5)]
    absmaxes = [torch.rand(n) for n in (2, 1)]
    return tuple(
        [t.clone() for t in found] for found in (floats,) * 2 + (codes,) * 2 + (absmaxes,) * 2
    )


@emulated
def test_opcheck(qw: qkern.QuantizedTensor) -> None:
    ops = torch.ops.qkern
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for op, arguments in (
        (ops.quantize_4bit, (torch.randn(130), "nf4", 64, None)),
        (ops.dequantize_4bit, (*qw.weight, [40, 96], torch.bfloat16)),
        (ops.quantize_absmax, (torch.rand(300),)),
        (ops.linear_4bit, (torch.randn(3, 96), *qw.weight, 40)),
        (ops.linear_4bit_dx, (torch.randn(3, 40), *qw.weight, 96)),
        (ops.adamw_step, (*adamw_lists(), torch.rand(2, reference.ADAMW_FACTORS), 1)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=utils)


@emulated
def test_the_optimizer_takes_the_same_steps() -> None:
    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [torch.randn(n, requires_grad=True) for n in (700, 3)]
        optimizer = qkern.optim.PagedAdamW8bit(params, lr=1e-2, max_grad_norm=1.0, min_8bit_size=1)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        return [param.detach() for param in params]

    found = train()
    with backends.use("reference"):
        expected = train()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@emulated
def test_compiled_without_a_graph_break(qw: qkern.QuantizedTensor) -> None:
    compiled = torch.compile(
        lambda x: qkern.nf4_linear(x, qw).relu(), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 96)
    assert torch.equal(compiled(x), qkern.nf4_linear(x, qw).relu())


@needs_triton
def test_tuning_measures_once_and_keeps_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkern.triton_kernels import launch, tune

    target = launch.Target("cuda", 90, 132)
    started: list[launch.Matmul] = []

    def milliseconds(start: object) -> float:
        start()  # type: ignore[operator]
        return 1.0 if started[-1].block_m == 64 else 2.0

    def choose(rows: int, batch_invariant: bool = False) -> launch.Matmul:
        problem = (torch.bfloat16, rows, 512, 1024)
        return tune.matmul("op", started.append, target, *problem, batch_invariant)

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "_CHOICES", {})
    assert choose(5).block_m == 16
    file = tmp_path / "tiles.json"
    monkeypatch.setenv("QKERN_TRITON_TUNE", str(file))
    assert choose(5, batch_invariant=True).block_m == 16
    assert not started
    assert choose(5).block_m == 64
    measured = len(started)
    assert measured == len(launch.tiles(target, torch.bfloat16))
    monkeypatch.setattr(tune, "_CHOICES", {})
    assert choose(7).block_m == 64
    assert len(started) == measured
    assert list(json.loads(file.read_text())) == ["op cuda 90 torch.bfloat16 8 512 1024"]
    choose(9)
    assert len(started) == 2 * measured


@needs_triton
def test_tiles_that_others_choose_meanwhile_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkern.triton_kernels import launch, tune

    target, file = launch.Target("cuda", 90, 132), tmp_path / "tiles.json"
    most = launch.tiles(target, torch.bfloat16)[0]
    of_others = {"of another process": [1, 2, 3, 4]}
    measuring, most_measuring = 0, 0

    def milliseconds(start: object) -> float:
        nonlocal measuring, most_measuring
        measuring += 1
        most_measuring = max(most_measuring, measuring)
        if not file.exists():
            file.write_text(json.dumps(of_others))
        time.sleep(0.0005)
        measuring -= 1
        return 1.0

    def choose(depth: int) -> launch.Matmul:
        return tune.matmul("op", lambda _: None, target, torch.bfloat16, 5, 512, depth, False)

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "_CHOICES", {})
    monkeypatch.setenv("QKERN_TRITON_TUNE", str(file))
    depths = [64 * (1 + i // 2) for i in range(8)]
    with ThreadPoolExecutor(len(depths)) as threads:
        list(threads.map(choose, depths))
    assert most_measuring == 1
    mine = {f"op cuda 90 torch.bfloat16 8 512 {depth}": list(most) for depth in depths}
    assert json.loads(file.read_text()) == of_others | mine
    assert list(tmp_path.iterdir()) == [file]


@needs_triton
@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}', '{"a": [1, 2, 3]}', None])
def test_a_file_that_has_no_tiles_is_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkern.triton_kernels import launch, tune

    file = tmp_path / "tiles.json"
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    monkeypatch.setenv("QKERN_TRITON_TUNE", str(file))
    target, problem = launch.Target("cuda", 90, 132), (torch.bfloat16, 5, 512, 1024, False)
    with pytest.raises(ValueError, match=rf"^QKERN_TRITON_TUNE: got '{file}', which .*; takes"):
        tune.matmul("op", lambda _: None, target, *problem)


VERSIONS = ("3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
_COMPILE = """
import sys
import triton
from lab.triton.static import compile as compiler
assert triton.__version__ == sys.argv[1], triton.__version__
for architecture in (90, "gfx942") if sys.argv[1] >= "3.5" else (90,):
    with compiler.compiling(architecture) as launched:
        for only in ("-bf16", "quantize_absmax"):
            for name, call in compiler.calls(only).items():
                call()
    print(architecture, len(launched))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_compiles_with_other_versions_of_triton(version: str, tmp_path: Path) -> None:
    """With those that `make triton-versions` has put into build/triton.

    Before 3.5 Triton needs a linker of ROCm's for AMD.
    """
    folder = ROOT / "build" / "triton" / version
    if not (folder / "triton").is_dir():
        pytest.skip(f"Triton {version} is not in build/triton: run `make triton-versions`")
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, version],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tools")])}
        | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert counts
    assert min(counts) >= 20
