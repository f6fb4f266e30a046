"""Importing is quiet; the report tells the truth; backends are chosen and forced as documented."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qkern
from lab import ROOT
from lab.processes import fresh_python
from qkern import backends, env
from qkern.backends import cpu, reference

needs_native = pytest.mark.skipif(
    cpu.missing_reason() is not None, reason=str(cpu.missing_reason())
)


def python(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    done = fresh_python(*args, **variables)
    done.check_returncode()
    return done


def test_import_is_quiet_and_starts_no_device() -> None:
    code = (
        "import torch; before = torch.get_num_threads(), torch.get_default_dtype();"
        "import qkern; assert not torch.cuda.is_initialized();"
        "assert before == (torch.get_num_threads(), torch.get_default_dtype());"
        "assert all(hasattr(qkern, name) for name in qkern.__all__)"
    )
    result = python("-c", code)
    assert result.stdout == result.stderr == ""


def test_import_brings_little_beyond_torch() -> None:
    """Not torch's compiler, which takes longer than torch itself; not a library that few use."""
    code = """
import sys
import torch
before = set(sys.modules)
import qkern, qkern.env, qkern.io, qkern.nn, qkern.optim
new = set(sys.modules) - before
print(*sorted(name for name in new if name.partition(".")[0] not in sys.stdlib_module_names))
"""
    new = python("-c", code).stdout.split()
    assert "qkern.functional" in new
    # Neither is large: the tensors' files, and a checksum.
    known = {"qkern", "safetensors", "isal"}
    assert [name for name in new if name.partition(".")[0] not in known] == []


SOURCES = (".py", ".cpp", ".h")
WRONG_VARIABLES = {
    "QKERN_BACKEND": ("fast", "takes one of cpu, cuda, triton, reference"),
    "QKERN_CPU_ISA": ("sse9", "takes one of scalar"),
    "QKERN_NATIVE_LIBRARY": ("/nowhere/_C.so", "cannot be loaded"),
    "QKERN_CUDA_PATH": ("fast", ""),  # in tests/cuda/test_paths.py
    "QKERN_TRITON_TUNE": ("/", ""),  # in tests/triton/test_backend.py
}


@pytest.mark.parametrize("name", ["QKERN_BACKEND", "QKERN_CPU_ISA", "QKERN_NATIVE_LIBRARY"])
def test_a_wrong_variable_is_named_with_its_value(name: str) -> None:
    """At the first op, or at the import; and in the report where there is one."""
    value, takes = WRONG_VARIABLES[name]
    if name == "QKERN_CPU_ISA" and cpu.missing_reason():
        pytest.skip("qkern._C is not built")
    code = """
import torch, qkern
from qkern import env
try:
    qkern.quantize_4bit(torch.ones(64))
except (ValueError, RuntimeError) as error:
    print(error)
env.main([])
"""
    result = fresh_python("-c", code, **{name: value})
    if name == "QKERN_NATIVE_LIBRARY":
        assert result.returncode == 1
        error = result.stderr.strip().splitlines()[-1]
    else:
        error, *report = result.stdout.splitlines()
        message = error.removeprefix("quantize_4bit: ")
        assert any(message in line for line in report)
    assert re.search(rf"{name}: (got )?'{value}'.*{takes}", error), error


def test_every_variable_that_is_read_at_run_time_is_tested() -> None:
    folders = Path(qkern.__file__).parent, ROOT / "triton_kernels", ROOT / "csrc"
    sources = [path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES]
    read = re.compile(r'(?:environ\.get\(|environ\[|getenv\()"(QKERN_\w+)"')
    found = {name for path in sources for name in read.findall(path.read_text("utf-8"))}
    assert found == WRONG_VARIABLES.keys()


def test_report_as_json_and_text() -> None:
    result = python("-W", "error:::runpy", "-m", "qkern.env", "--json")
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert found["torch"] == torch.__version__
    assert found["qkern"] == qkern.__version__
    assert found["devices"]["cpu"]["backends"] == backends.available("cpu")
    assert found["environment"].keys().isdisjoint({"QKERN_BACKEND"})
    assert found["native"]["built"] == (cpu.missing_reason() is None)

    text = "\n".join(env._lines(found))
    assert f"torch{' ' * 10}" in text
    assert found["platform"] in text


@needs_native
def test_report_tells_instruction_sets_and_one_openmp_runtime() -> None:
    found = json.loads(python("-m", "qkern.env", "--json", QKERN_CPU_ISA="scalar").stdout)
    kernels = found["native"]
    assert kernels["instruction_set"] == "scalar"
    assert kernels["instruction_sets"] == cpu.available_isas()
    assert kernels["build"]["version"] == qkern.__version__
    assert found["devices"]["cpu"]["selected"] == "cpu"
    assert found["environment"]["QKERN_CPU_ISA"] == "scalar"
    if found["openmp_runtimes"] is not None:
        assert len(found["openmp_runtimes"]) == 1


def test_without_native_kernels_the_reference_works_and_the_report_says_why() -> None:
    code = """
import sys
sys.modules["qkern._C"] = None
import torch, qkern, qkern.env
x = torch.ones(2, 64, requires_grad=True)
qkern.nf4_linear(x, qkern.quantize_4bit(torch.randn(3, 64))).sum().backward()
qkern.env.main([])
print("---")
try:
    with qkern.backends.use("cpu"):
        pass
except RuntimeError as error:
    print(error)
print("---")
qkern.env.main(["--json"])
"""
    text, error, report = python("-c", code).stdout.split("---")
    reason = "qkern._C cannot be imported"
    assert reason in text
    assert error.strip().startswith(f"name: the backend 'cpu' is missing: {reason}")
    found = json.loads(report)
    assert found["native"]["built"] is False
    assert reason in found["native"]["reason"]
    cpu = found["devices"]["cpu"]
    assert cpu["selected"] == "reference"
    assert cpu["backends"] == {"cpu": found["native"]["reason"], "reference": None}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets QKERN_BACKEND as if the process had started with it."""

    def force(name: str) -> None:
        monkeypatch.setenv("QKERN_BACKEND", name)
        monkeypatch.setattr(backends, "selected", {})

    return force


def test_forcing_by_the_environment(forced: Callable[[str], None]) -> None:
    forced("reference")
    assert backends.selected_name("cpu") == "reference"
    assert env.report()["environment"]["QKERN_BACKEND"] == "reference"
    forced("")
    assert backends.selected_name("cpu") == next(
        name for name, reason in backends.available("cpu").items() if reason is None
    )


def test_an_unknown_backend_in_the_environment(
    forced: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    forced("fast")
    message = "QKERN_BACKEND: got 'fast'; takes one of cpu, cuda, triton, reference"
    with pytest.raises(ValueError, match=message):
        qkern.quantize_4bit(torch.ones(64))
    assert env.report()["devices"]["cpu"]["error"] == message
    assert env.main([]) == 0
    assert message in capsys.readouterr().out


def test_use_forces_and_restores() -> None:
    before = backends.selected_name()
    with backends.use("reference"):
        assert backends.select(torch.device("cpu")) is reference
        assert backends.selected_name() == "reference"
    assert backends.selected_name() == before
    with pytest.raises(KeyError), backends.use("reference"):
        raise KeyError
    assert backends.selected_name() == before


@needs_native
def test_use_forces_and_restores_the_instruction_set() -> None:
    before = cpu.isa()
    for name in cpu.available_isas():
        with backends.use("cpu", isa=name):
            assert cpu.isa() == name
            assert backends.selected_name() == "cpu"
    assert cpu.isa() == before
    with pytest.raises(ValueError, match="z80"), backends.use("cpu", isa="z80"):
        pass
    assert cpu.isa() == before


def test_use_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name: got 'fast'; takes one of"), backends.use("fast"):
        pass
    forced = backends.use("triton")
    monkeypatch.setattr(backends.triton, "missing_reason", lambda: "not installed")
    with pytest.raises(RuntimeError, match="'triton' is missing: not installed"), forced:
        pass
    with pytest.raises(ValueError, match="isa: got"), backends.use("reference", isa="avx2"):
        pass


@needs_native
def test_a_forced_backend_does_not_take_other_devices() -> None:
    with backends.use("cpu"), pytest.raises(RuntimeError, match="does not take cuda tensors"):
        backends.select(torch.device("cuda"))


def test_other_devices_take_the_reference() -> None:
    assert backends.select(torch.device("xpu")) is reference
    assert backends.available("xpu") == {"reference": None}


def test_a_backend_object_is_forced_as_its_name_is() -> None:
    class Missing(backends.Backend):
        def missing_reason(self) -> str:
            return "not built"

    with (
        pytest.raises(RuntimeError, match="name: the backend 'mine' is missing: not built"),
        backends.use(Missing("mine")),
    ):
        pass
    with (
        pytest.raises(TypeError, match="name: got int; takes a name or a Backend"),
        backends.use(3),
    ):
        pass
    with backends.use(backends.reference):
        assert backends.selected_name() == "reference"
