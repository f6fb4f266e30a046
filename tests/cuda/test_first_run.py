"""The first run on a GPU, dry: its steps on the emulator, and what it says when things go wrong."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import ROOT
from lab.cuda import ways
from lab.cuda.emulator import build as emulator
from lab.cuda.first_run import (
    checks,
    device,
    launches,
    products,
    times,
)
from tests.benchmarks.test_gpu import Stream

SCRIPT = ROOT / "tools" / "first_gpu_run.sh"
needs_emulator = pytest.mark.skipif(emulator.compiler() is None, reason="the emulator needs g++")
pytestmark = pytest.mark.unpoisoned

OPTIONAL = ("bitsandbytes", "hypothesis", "matplotlib", "psutil", "pytest", "scipy", "triton")
"""What a machine that only runs models may lack."""
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        absent = name.partition(".")[0] in {OPTIONAL!r}
        return None if absent else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script, with its results in ``folder`` and this Python."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    own = {"PY": sys.executable, "OUT": str(folder), "WORK": str(folder / "work")}
    return subprocess.run(
        [SCRIPT, *arguments],
        env=inherited | own | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_emulator
def test_a_dry_run_where_only_torch_is_installed(tmp_path: Path) -> None:
    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "sitecustomize.py").write_text(WITHOUT)
    only = "machine,build,env,table,times,counters,memcheck,triton,optimizer"
    done = run(tmp_path, "--dry", "--only", only, PEERS="peers")
    page = (tmp_path / "summary.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + page
    assert page.startswith("# First run on 1 x the emulator, dry")
    assert "Nothing went wrong" in page
    assert "pytest absent" in page
    assert "| optimizer | absent | 0 | pytest is not installed |" in page
    assert "| memcheck | left out | 0 | a dry run has no GPU for it |" in page
    for heading in ("Choices", "Measured over modelled", "Crossovers", "Times", "Dequantise"):
        assert f"\n## {heading}\n" in page
    names = {"summary.md", "steps.json", "machine.json", "times.json", "log.txt"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == names
    found = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert [step["name"] for step in found] == only.split(",")
    content = json.loads((tmp_path / "times.json").read_text())
    assert {row["op"] for row in content["results"]} == {"forward", "dx", "dequantize"}
    forward = [r for r in content["results"] if r["op"] == "forward" and r["m"] == 1]
    by_path = Counter(row["path"] for row in forward if row["shape"] == [96, 128] and "path" in row)
    assert by_path == {
        "vector": 2,
        "mma": 1,
        "tiled": 1,
        "wgmma": 1,
        "gemm": 1,
    }  # the chosen one also as such
    assert all(row["modelled_ms"] > 0 for row in forward if "path" in row)
    assert any("without bitsandbytes" in note for note in content["notes"])


@needs_emulator
@pytest.mark.slow
def test_a_whole_dry_run(tmp_path: Path) -> None:
    done = run(tmp_path, "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "summary.md").read_text()
    passed = ("machine", "build", "env", "table", "sizes", "streams", "times", "launches")
    for name in (*passed, "optimizer"):
        assert f"\n| {name} | passed |" in page


@needs_emulator
@pytest.mark.parametrize("kind", ["sizes", "streams"])
def test_checks_pass_and_take_every_way(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.main([kind, "--dry"]) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = [line.split(" ", 3)[2:] for line in lines if line.startswith(checks.AT)]
    assert lines.count(checks.OK) == len(labels)
    assert lines[-1] == f"ran {len(labels)} checks"
    # Such small weights go in one slice.
    assert {way for way, _ in labels} - {"chosen"} == set(ways.WAYS) - {ways.SLICES}


@needs_emulator
@pytest.mark.parametrize("kind", ["sizes", "streams"])
def test_a_wrong_product_fails_its_check(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong_way = products.multiply, "tiled"

    def multiply(qw, x, dx):
        y = right(qw, x, dx)
        # As a kernel would that leaves a row out of some launches: not the first of them.
        calls[dx] += 1
        if os.environ.get("QKERN_CUDA_PATH") == wrong_way and calls[dx] % 2:
            y[-1] = 0
        return y

    calls = Counter()
    monkeypatch.setattr(f"lab.cuda.first_run.{kind}.multiply", multiply)
    assert checks.main([kind, "--dry"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed
    assert {line.split()[1] for line in failed} == {wrong_way}


@needs_emulator
def test_the_table_has_every_case_on_every_way() -> None:
    found = [check.label for check in checks.checks(checks.parse(["table", "--dry"]))]
    assert len(found) == len(set(found))
    counts = Counter(label.partition(" ")[0] for label in found)
    assert counts.keys() == {"chosen", *ways.WAYS}
    assert min(counts.values()) > 100
    small = [c.label for c in checks.checks(checks.parse(["table", "--dry", "--stride", "10"]))]
    assert set(small) < set(found)
    assert len(small) < len(found) / 5


@needs_emulator
def test_launches_for_a_profiler() -> None:
    assert launches.launch(device.get(dry=True)) == 14


def test_a_check_that_loses_the_device_ends_its_process(capsys: pytest.CaptureFixture[str]) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\n more")

    def wrong() -> None:
        raise AssertionError("3 of 4 differ")

    found = [checks.Check(f"mma {i}", work) for i, work in enumerate((wrong, lost, wrong))]
    assert checks.run(found, range(3), time.monotonic() + 60) == checks.AGAIN
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "at 0 mma 0",
        "FAIL mma 0: AssertionError: 3 of 4 differ",
        "at 1 mma 1",
        "FAIL mma 1: RuntimeError: CUDA error: an illegal memory access was encountered more",
    ]
    assert checks.run(found, range(3), time.monotonic() - 1) == 0
    assert capsys.readouterr().out.splitlines() == ["left 0 mma 0", "ran 0 checks"]


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "machine,bild")
    assert done.returncode == 2
    assert "--only: got bild; takes machine, build, env, table" in done.stderr


def test_without_a_gpu_the_page_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(tmp_path)
    assert done.returncode == 1
    page = (tmp_path / "summary.md").read_text()
    assert f"  - torch {torch.__version__} finds no CUDA device" in page
    assert "- **times: NOT RUN** it needs build, env" in page


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PY": "/nowhere/python3"}, "/nowhere/python3 is not found: PY names a Python"),
        ({"PY": "false"}, "false does not run, or is older than Python 3.10"),
        ({"PEERS": "/nowhere/peers"}, "PEERS: /nowhere/peers is no folder"),
    ],
)
def test_what_the_script_cannot_begin_without(
    variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = run(tmp_path, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert said in (tmp_path / "summary.md").read_text()


def test_the_clock_rate_is_of_a_kernel_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    Stream(monkeypatch)  # whose device runs a thousand cycles in a microsecond
    gpu = SimpleNamespace(device=torch.device("cpu"))
    assert device.Gpu.megahertz(gpu) == pytest.approx(1000.0)


def test_work_is_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        done.append("begin")
        yield
        done.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    replay = device.Gpu.captured(SimpleNamespace(), lambda: done.append("work") or "memory")
    assert done == ["begin", "work", "end"]
    assert replay() == "memory"
    assert done[3:] == ["replay"]


def test_another_stream_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Queue:
        def __init__(self, name: str = "other") -> None:
            self.name = name

        def wait_stream(self, stream: Queue) -> None:
            done.append(f"{self.name} waits for {stream.name}")

    @contextlib.contextmanager
    def use(stream: Queue) -> Iterator[None]:
        done.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Queue("current"))
    monkeypatch.setattr(torch.cuda, "Stream", Queue)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("busy"))
    with device.Gpu.other_stream(SimpleNamespace()):
        done.append("work")
    waits = "other waits for current", "current waits for other"
    assert done == [waits[0], "on other", "busy", "work", waits[1]]


@needs_emulator
def test_a_path_that_fails_is_said_and_the_others_are_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = products.multiply

    def multiply(qw, x, dx):
        path = os.environ.get("QKERN_CUDA_PATH")
        if path == "gemm":
            raise RuntimeError("cuBLAS has none")
        return right(qw, x, dx) * (2 if path == "tiled" else 1)

    monkeypatch.setattr(times, "multiply", multiply)
    monkeypatch.setattr(times, "DRY_SHAPES", ((32, 64),))
    monkeypatch.setattr(times, "DRY_ROWS", (2,))
    file = tmp_path / "times.json"
    assert checks.main(["times", "--dry", "--file", str(file)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 2
    assert failed[0].startswith("FAIL times forward 32x64 M=2: AssertionError: qkern tiled: Wrong")
    assert failed[0].endswith("; qkern gemm: RuntimeError: cuBLAS has none")
    rows = json.loads(file.read_text())["results"]
    assert {row["path"] for row in rows if "path" in row} == {"vector", "mma", "wgmma"}
    # A process that is begun again goes on with the file.
    assert checks.main(["times", "0", "1", "2", "--dry", "--file", str(file)]) == 1
    more = json.loads(file.read_text())["results"]
    assert more[: len(rows)] == rows
    assert {row["op"] for row in more[len(rows) :]} == {"dx"}


@needs_emulator
def test_a_path_that_ended_its_process_is_left_out_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = products.multiply

    def multiply(qw, x, dx):
        if os.environ.get("QKERN_CUDA_PATH") == "mma":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return right(qw, x, dx)

    monkeypatch.setattr(times, "multiply", multiply)
    monkeypatch.setattr(times, "DRY_SHAPES", ((32, 64),))
    monkeypatch.setattr(times, "DRY_ROWS", (2,))
    file = tmp_path / "times.json"
    arguments = ["--dry", "--file", str(file)]
    assert checks.main(["times", "0", "1", "0", *arguments]) == checks.AGAIN
    assert (tmp_path / "times.trying").read_text() == "qkern mma"
    assert "FAIL times forward 32x64 M=2: RuntimeError: CUDA error" in capsys.readouterr().out
    assert checks.main(["times", "0", "1", "2", *arguments]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]
    content = json.loads(file.read_text())
    assert content["notes"] == ["left out, having ended or held up a process: qkern mma"]
    assert {row.get("path") for row in content["results"] if row["op"] == "dx"} >= {"tiled", "gemm"}
    assert "mma" not in {row.get("path") for row in content["results"] if row["name"] != "qkern"}


def test_make_test_gpu_needs_no_setup(tmp_path: Path) -> None:
    command = ["make", "--dry-run", "--no-print-directory", "test-gpu", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "PY=python3 " in done.stdout
    assert "tools/first_gpu_run.sh --only machine,build,env" in done.stdout
    assert "pip" not in done.stdout
    assert "-m venv" not in done.stdout
