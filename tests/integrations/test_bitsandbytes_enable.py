"""`enable` and `disable` themselves: what they replace, put back, and refuse."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from lab.processes import environment
from qkern import backends
from qkern.integrations import bitsandbytes as integration
from tests.integrations.bnb_helpers import assert_product, dense, layer, oracle, quantized

functions, modules = bnb.autograd._functions, bnb.nn.modules
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _disabled_again():
    before = parts()
    yield
    integration.disable()
    assert parts() == before


def parts() -> list[Any]:
    """All of bitsandbytes that `enable` replaces."""
    return [
        bnb.matmul_4bit,
        functions.matmul_4bit,
        functions.MatMul4Bit,
        modules._convert_weight_packed_for_cpu_inverse,
        vars(bnb.nn.Linear4bit).get("support_avx512bf16_for_cpu"),
    ]


def has_kernels() -> bool:
    """Whether an op that bitsandbytes lacks on CPUs is there."""
    packed, state = quantized((4, 64))
    args = packed, state.absmax, 64, "nf4", (4, 64), torch.float32
    try:
        torch.ops.bitsandbytes.dequantize_4bit.out(*args, out=torch.empty(4, 64))
    except NotImplementedError:
        return False
    return True


def test_on_and_off():
    before = parts()
    assert not has_kernels()
    assert integration.enable().devices == ("cpu",)
    assert integration.enabled_devices() == ("cpu",)
    assert has_kernels()
    assert all(a is not b for a, b in zip(parts(), before, strict=True))
    integration.disable()
    assert integration.enabled_devices() == ()
    assert not has_kernels()
    assert parts() == before
    integration.disable()


def test_twice_is_once():
    before = parts()
    integration.enable()
    during = parts()
    assert integration.enable(["cpu", "cpu"]).devices == ()
    assert parts() == during
    integration.disable()
    assert parts() == before
    assert not has_kernels()


def test_an_inner_block_leaves_an_outer_ones():
    with integration.enable():
        with integration.enable() as inner:
            assert inner.devices == ()
        assert has_kernels()
    assert not has_kernels()


def test_an_error_in_the_block_disables():
    with pytest.raises(KeyError), integration.enable():
        raise KeyError
    assert not has_kernels()


def test_what_somebody_else_put_in_its_place_stays(monkeypatch):
    integration.enable()
    calls = []
    ours = bnb.matmul_4bit

    @functools.wraps(ours)
    def counted(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    before = functions.MatMul4Bit
    monkeypatch.setattr(bnb, "matmul_4bit", counted)
    integration.disable()
    assert bnb.matmul_4bit is counted
    made, x = layer(), dense((3, 96))
    assert_product(made(x), x, oracle(made.weight.data, made.weight.quant_state), made.bias)
    assert len(calls) == 1
    assert functions.MatMul4Bit is not before
    with integration.enable():
        assert_product(made(x), x, oracle(made.weight.data, made.weight.quant_state), made.bias)
    monkeypatch.undo()
    bnb.matmul_4bit = functions.matmul_4bit


def test_layers_made_while_it_is_on_pack_as_their_processor_does_afterwards():
    with integration.enable():
        made = layer()
        assert made.support_avx512bf16_for_cpu is False
    assert made.support_avx512bf16_for_cpu == bnb.functional.has_avx512bf16()


@pytest.mark.parametrize(
    ("devices", "error", "message"),
    [
        ("cpu", TypeError, r"devices: got 'cpu'; takes several"),
        (("cpu", "mps"), ValueError, "devices: got 'mps'; takes cpu, cuda"),
    ],
)
def test_other_devices_are_refused(devices, error, message):
    for call in (integration.enable, integration.disable):
        with pytest.raises(error, match=message):
            call(devices)
    assert not has_kernels()


def test_a_device_without_kernels_is_refused(monkeypatch):
    reasons = {"cuda": "no GPU", "triton": None, "reference": None}
    on_cpu = backends.available("cpu")
    monkeypatch.setattr(
        backends, "available", lambda device: dict(on_cpu if device == "cpu" else reasons)
    )
    assert integration.enable(["cuda"]).devices == ("cuda",)
    assert not has_kernels()  # on CPUs
    integration.disable()
    reasons["triton"] = "not installed"
    with pytest.raises(RuntimeError, match=r"no kernels for 'cuda' here .*no GPU; triton: not"):
        integration.enable(["cpu", "cuda"])
    assert integration.enabled_devices() == ()


@pytest.mark.parametrize("version", ["0.49.2", "0.51.0", "1.0", "unknown"])
def test_another_version_is_refused(version, monkeypatch):
    before = parts()
    monkeypatch.setattr(bnb, "__version__", version)
    with pytest.raises(RuntimeError, match=f"got version {version}; takes 0.50 and above, below"):
        integration.enable()
    assert parts() == before
    assert not has_kernels()


def test_at_its_import_the_version_is_that_of_its_distribution(monkeypatch):
    monkeypatch.delattr(bnb, "__version__")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.49.0")
    with pytest.raises(RuntimeError, match=r"got version 0\.49\.0"):
        integration.enable()


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (functions, "matmul_4bit", lambda A, B, out: None, r"matmul_4bit: got \(A, B, out\); take"),
        (functions.MatMul4Bit, "forward", lambda ctx, A: None, r"forward: got \(ctx, A\); takes"),
        (bnb.nn.Linear4bit, "forward", lambda self, y: None, r"forward: got \(self, y\)"),
        (modules, "_convert_weight_packed_for_cpu_inverse", None, "inverse: got none; takes"),
    ],
)
def test_other_functions_are_refused(owner, name, value, message, monkeypatch):
    monkeypatch.setattr(owner, name, value)
    before = parts()
    with pytest.raises(RuntimeError, match=message):
        integration.enable()
    assert parts() == before
    assert not has_kernels()


@pytest.mark.parametrize(
    ("names", "message"),
    [("A B", r"gemm_4bit: got \(A, B, shapeB, .*; takes \(A, B\)"), (None, "new_op: got none")],
)
def test_other_ops_are_refused(names, message, monkeypatch):
    kernel = integration.OPS["gemm_4bit"][0]
    name = "gemm_4bit" if names else "new_op"
    monkeypatch.setitem(integration.OPS, name, (kernel, names or "A"))
    with pytest.raises(RuntimeError, match=message):
        integration.enable()
    assert integration.enabled_devices() == ()


@pytest.mark.parametrize(
    ("value", "devices"), [("1", ("cpu",)), ("cpu", ("cpu",)), ("0", ()), ("", ()), (None, ())]
)
def test_the_variable_decides_at_its_import(value, devices, monkeypatch):
    monkeypatch.delenv("QKERN_BITSANDBYTES", raising=False)
    if value is not None:
        monkeypatch.setenv("QKERN_BITSANDBYTES", value)
    integration.enable_as_asked()
    assert integration.enabled_devices() == devices


@pytest.mark.parametrize("value", ["yes", "cpu;cuda", "2"])
def test_another_value_of_the_variable_is_refused(value, monkeypatch):
    monkeypatch.setenv("QKERN_BITSANDBYTES", value)
    with pytest.raises(ValueError, match=f"QKERN_BITSANDBYTES: got '{value}'; takes 0, 1 or"):
        integration.enable_as_asked()


def run(code: str, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    found = {**environment(), **variables}
    found["PYTHONPATH"] = os.pathsep.join([*map(str, paths), found.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=found, check=False
    )


def test_importing_qkern_imports_none_of_it():
    code = (
        "import sys, qkern; others = [m for m in sys.modules if m.split('.')[0] in ('bitsandbytes',"
        " 'transformers', 'peft', 'accelerate') or m.startswith('qkern.integrations')];"
        " assert not others, others"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def distribution(folder: Path, name: str) -> Path:
    """A folder in which a distribution says what ``pyproject.toml`` does of its entry points."""
    lines = (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    start = lines.index('[project.entry-points."bitsandbytes.backends"]')
    entry = lines[start + 1].replace('"', "")
    assert entry.startswith("qkern = ")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[bitsandbytes.backends]\n{entry}\n", "utf-8")
    return folder


CHECK = (
    "import bitsandbytes, torch; from qkern.integrations import bitsandbytes as found;"
    " print(found.enabled_devices(), bitsandbytes.matmul_4bit.__module__)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1", "('cpu',) qkern.integrations._bnb_matmul"),
        ("", "() bitsandbytes.autograd._functions"),
    ],
)
def test_its_entry_point_enables_where_asked(value, said, tmp_path):
    # A name of its own: an installed qkern may have the entry point too, and comes after it.
    folder = distribution(tmp_path, "qkern-entry-point")
    done = run(CHECK, folder, QKERN_BITSANDBYTES=value)
    assert done.stdout.strip() == said, done.stderr


@pytest.mark.slow
def test_its_entry_point_says_what_is_wrong(tmp_path):
    folder = distribution(tmp_path, "qkern-entry-point")
    done = run(CHECK, folder, QKERN_BITSANDBYTES="maybe")
    assert done.returncode
    assert "failed to load backend qkern: QKERN_BITSANDBYTES: got 'maybe'" in done.stderr


@pytest.mark.slow
def test_enabling_first_imports_and_enables_once(tmp_path):
    """Its import calls the entry point, inside of `enable`."""
    folder = distribution(tmp_path, "qkern-entry-point")
    code = (
        "from qkern.integrations import bitsandbytes as found; handle = found.enable();"
        " print(handle.devices, found.enabled_devices()); found.disable();"
        " import bitsandbytes; print(bitsandbytes.matmul_4bit.__module__)"
    )
    done = run(code, folder, QKERN_BITSANDBYTES="1")
    expected = ["() ('cpu',)", "bitsandbytes.autograd._functions"]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.slow
def test_without_bitsandbytes_the_error_says_so(tmp_path):
    (tmp_path / "bitsandbytes.py").write_text(
        "raise ModuleNotFoundError('none', name='bitsandbytes')", "utf-8"
    )
    done = run("from qkern.integrations.bitsandbytes import enable; enable()", tmp_path)
    assert "ImportError: bitsandbytes is not installed" in done.stderr
