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
    __main__ as first_run,
)
from lab.cuda.first_run import (
    build,
    checks,
    counters,
    device,
    launches,
    plan,
    products,
    shards,
    steps,
    summary,
    times,
    tools,
)
from lab.cuda.first_run.steps import Outcome, Step
from lab.processes import environment
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
    assert by_path == {"vector": 2, "mma": 1, "tiled": 1, "gemm": 1}  # the chosen one also as such
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
    assert launches.launch(device.get(dry=True)) == 10


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


PLANTED = """
import os, signal, sys, time
shard, shards, first = map(int, sys.argv[2:5])
for index in range(shard, 9, shards):
    if index < first:
        continue
    print(f"at {index} way{index % 2} check{index}", flush=True)
    if index == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if index == 4:
        time.sleep(60)
    if index == 6:
        print("FAIL way0 check6: CUDA error", flush=True)
        sys.exit(75)
    print("ok", flush=True)
print("ran some checks")
"""


def test_shards_go_on_after_checks_that_end_or_hang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(shards, "_BEGIN_SECONDS", 30.0)
    assert shards.main(2, 0.5, ["table"], "planted") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "FAIL way0 check2: the process ended with status -11",
        "FAIL way0 check4: it hangs, nothing for 0 s",
        "FAIL way0 check6: CUDA error",
        "9 checks, 3 failed: way0 5, way1 4",
    ]


def test_a_shard_that_never_begins_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert shards.main(1, 5, ["table"], "planted") == 1
    assert "FAIL before the first check: exit status 3" in capsys.readouterr().out


def program(code: str) -> list[list[str]]:
    return [[sys.executable, "-c", code]]


PLANTED_STEPS = (
    Step("right", 20, program("print('all is well')")),
    Step("wrong", 20, program("print('FAIL mma case 1: off by one'); raise SystemExit(1)")),
    Step("silent", 20, program("print('FAIL mma case 2: off by two')")),
    Step("crashed", 20, program("import os; print('before', flush=True); os.abort()")),
    Step("hanging", 1, program("import subprocess; subprocess.run(['sleep', '77'])")),
    Step("impossible", 20, [["/nowhere/tool"]]),
    Step("missing", 20, missing="nvcc is not found"),
    Step("absent", 20, absent="ncu is not found"),
    Step("elsewhere", 20, left_out="no GPU"),
    Step("excused", 20, program("raise SystemExit('denied: ERR')"), excuses={"ERR": "no right"}),
    Step("fault", 20, program("print('== Invalid read')"), faults="=+ Invalid"),
    Step("after", 20, program(""), needs=("right", "hanging")),
)


def outcomes_of(found: tuple[Step, ...], folder: Path, seconds: float) -> dict[str, Outcome]:
    pages: list[int] = []
    outcomes = steps.run(found, folder, seconds, lambda so_far: pages.append(len(so_far)))
    assert pages == list(range(len(found) + 1))
    return {outcome.name: outcome for outcome in outcomes}


def test_what_becomes_of_steps(tmp_path: Path) -> None:
    found = outcomes_of(PLANTED_STEPS, tmp_path, 100)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "right": steps.PASSED,
        "wrong": steps.FAILED,
        "silent": steps.FAILED,
        "crashed": steps.FAILED,
        "hanging": steps.CUT,
        "impossible": steps.FAILED,
        "missing": steps.FAILED,
        "absent": steps.ABSENT,
        "elsewhere": steps.LEFT_OUT,
        "excused": steps.ABSENT,
        "fault": steps.FAILED,
        "after": steps.NOT_RUN,
    }
    assert found["right"].said == "all is well"
    assert found["wrong"].failures == ["mma case 1: off by one"]
    assert found["crashed"].reason == "ended by SIGABRT"
    assert found["hanging"].seconds < 5
    assert "/nowhere/tool" in found["impossible"].reason
    assert found["after"].reason == "it needs hanging"
    # What the hanging program had started is ended too.
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False)
    assert "sleep 77" not in listed.stdout.splitlines()

    page = summary.page({}, list(found.values()), {}, [], 12)
    assert page.index("## What went wrong") < page.index("## Steps")
    for line in (
        "8 of 12 steps went wrong in 12 s.",
        "- **wrong: FAILED** exit status 1; 1 failures: mma 1\n  - mma case 1: off by one",
        "- **hanging: OVER ITS LIMIT** after 1 s",
        "- **missing: FAILED** nvcc is not found",
        "- **after: NOT RUN** it needs hanging",
        "| absent | absent | 0 | ncu is not found |",
        "| excused | absent | 0 | no right |",
        "No times were measured.",
    ):
        assert line in page


def test_all_steps_share_one_limit(tmp_path: Path) -> None:
    slow = program("import time; time.sleep(30)")
    begin = time.monotonic()
    found = outcomes_of((Step("first", 60, slow), Step("second", 60, slow)), tmp_path, 3.5)
    assert time.monotonic() - begin < 6
    assert found["first"].status == steps.CUT
    assert (found["second"].status, found["second"].reason) == (
        steps.NOT_RUN,
        "no time was left",
    )


def test_a_program_knows_its_limit(tmp_path: Path) -> None:
    code = f"import os; print(os.environ['{steps.SECONDS}'])"
    found = outcomes_of((Step("one", 17, program(code)),), tmp_path, 100)
    assert 15 < float(found["one"].said) <= 17


@pytest.mark.parametrize(
    ("wrong", "status"),
    [("wrong", 1), ("hanging", 1), ("missing", 1), ("absent", 0), ("elsewhere", 0)],
)
def test_the_exit_status(
    wrong: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = [step for step in PLANTED_STEPS if step.name in ("right", wrong)]
    monkeypatch.setattr(plan, "steps", lambda folders, dry: planted)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("WORK", str(tmp_path / "work"))
    monkeypatch.setattr(first_run.signal, "signal", lambda *arguments: None)
    # Of an older run, which must not pass for this one's.
    (tmp_path / "times.json").write_text("{}")
    assert first_run.main([]) == status
    assert not (tmp_path / "times.json").exists()
    page = (tmp_path / "summary.md").read_text()
    assert ("What went wrong" in page) == bool(status)
    assert f"| {wrong} |" in page
    assert f"==== {wrong}" in (tmp_path / "log.txt").read_text()


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


def test_the_plan_of_a_gpu_says_what_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "find", lambda name: None)
    monkeypatch.setattr(tools, "nvcc", lambda: None)
    monkeypatch.setattr(tools, "has", lambda module: False)
    found = {step.name: step for step in plan.steps(plan.Folders(tmp_path, tmp_path), dry=False)}
    assert list(found)[-1] == "optimizer"
    assert "cmake, nvcc" in found["build"].missing
    assert "pybind11" in found["build"].missing
    absent = {name for name, step in found.items() if step.absent}
    assert absent == {"counters", "memcheck", "racecheck", "triton", "optimizer"}


def test_nvcc_is_found_off_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for toolkit in ("cuda-12.6", "cuda-13.0"):
        nvcc = tmp_path / toolkit / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("#!/bin/sh\n")
        nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tools, "_TOOLKITS", (str(tmp_path / "cuda-*"),))
    tools.find.cache_clear()
    try:
        assert tools.nvcc() == str(tmp_path / "cuda-13.0/bin/nvcc")
        monkeypatch.setenv("CUDACXX", str(tmp_path / "cuda-12.6/bin/nvcc"))
        assert tools.nvcc() == str(tmp_path / "cuda-12.6/bin/nvcc")
    finally:
        tools.find.cache_clear()


def test_a_home_that_cannot_be_written_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    found = plan.environment(plan.Folders(tmp_path, tmp_path), dry=True)
    assert os.access(found["HOME"], os.W_OK)
    assert found["TRITON_CACHE_DIR"].startswith(str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "HOME" not in plan.environment(plan.Folders(tmp_path, tmp_path), dry=True)


def test_a_builds_errors_are_told() -> None:
    lines = [
        "-- The CXX compiler identification is GNU 12.2.0",
        "CMake Error at CMakeLists.txt:2 (cmake_minimum_required):",
        "CMake 3.18...4.0 or higher is required.  You are running version 3.16.3",
        "",
        "-- Configuring incomplete, errors occurred!",
    ]
    assert build.errors(lines) == [
        "CMake Error at CMakeLists.txt:2 (cmake_minimum_required): CMake 3.18...4.0 or higher is "
        "required.  You are running version 3.16.3"
    ]
    said = "csrc/cuda/x.cu(3): error: identifier is undefined"
    assert build.errors(["[3/9] Building", said, "ninja: build stopped"]) == [said]


@pytest.mark.slow
@pytest.mark.skipif(tools.lacking() != "", reason=tools.lacking())
def test_it_builds_for_the_device_alone(tmp_path: Path) -> None:
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({"devices": 2 * [{"name": "H200", "capability": [9, 0]}]}))
    command = [sys.executable, "-m", "lab.cuda.first_run.build", str(tmp_path / "b"), str(machine)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout
    library = build.module(tmp_path / "b")
    assert library is not None
    code = "from qkern.backends import cpu; print(cpu.library().build_info()['cuda'])"
    variables = environment(QKERN_NATIVE_LIBRARY=str(library))
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables
    )
    assert told.stdout.rstrip().endswith(": 90-real 90-virtual")
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert "no work to do" in again.stdout


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


def test_another_stream_waits_for_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert done == ["busy", waits[0], "on other", "work", waits[1]]


RAW = """==PROF== Connected to process 1
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum"
"","","","us","Mbyte"
"0","_ZN5qkern4cuda22linear_4bit_mma_kernelIfLi2EEEvv","(4, 1, 1)","7.2","8.1"
"1","_ZN5qkern4cuda23dequantize_4bit_kernelEvv","(9, 1, 1)","5.0",""
"""

NCU = """#!/bin/sh
for word; do
  case $before in --log-file) file=$word;; --metrics) metrics=$word;; esac
  before=$word
done
case $metrics in
  *sm__inst_executed_pipe_tensor*)
    echo "==ERROR== Failed to find metric sm__inst_executed_pipe_tensor.sum" > $file; exit 1;;
esac
cp RAW $file
"""


def test_counters_are_read_and_unknown_ones_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ncu, file = tmp_path / "ncu", tmp_path / "counters.csv"
    (tmp_path / "raw").write_text(RAW)
    ncu.write_text(NCU.replace("RAW", str(tmp_path / "raw")))
    ncu.chmod(0o755)
    assert counters.count(str(ncu), file, ["true"]) == 0
    assert "Failed to find metric" in capfd.readouterr().out
    first, second = counters.read(file)
    assert first.counts == {"time": "7.2 us", "read": "8.1 Mbyte"}
    assert second.counts == {"time": "5.0 us"}
    page = summary.page({}, [], {}, [first, second], 1)
    assert "| linear_4bit_mma_kernel IfLi2EEEvv | (4, 1, 1) | 7.2 us | 8.1 Mbyte |" in page
    assert counters.read(tmp_path / "none.csv") == []


def test_no_permission_for_counters_is_no_failure(tmp_path: Path) -> None:
    said = f"==ERROR== {counters.NO_PERMISSION} - The user does not have permission"
    code = f"print({said!r}); raise SystemExit(1)"
    step = Step("counters", 9, program(code), excuses=plan._NO_PROFILER)
    found = outcomes_of((step,), tmp_path, 20)["counters"]
    assert found.status == steps.ABSENT
    assert "ERR_NVGPUCTRPERM" in found.reason


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
    assert {row["path"] for row in rows if "path" in row} == {"vector", "mma"}
    # A process that is begun again goes on with the file.
    assert checks.main(["times", "0", "1", "2", "--dry", "--file", str(file)]) == 1
    more = json.loads(file.read_text())["results"]
    assert more[: len(rows)] == rows
    assert {row["op"] for row in more[len(rows) :]} == {"dx"}


def test_make_test_gpu_needs_no_setup(tmp_path: Path) -> None:
    command = ["make", "--dry-run", "--no-print-directory", "test-gpu", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "PY=python3 " in done.stdout
    assert "tools/first_gpu_run.sh --only machine,build,env" in done.stdout
    assert "pip" not in done.stdout
    assert "-m venv" not in done.stdout
