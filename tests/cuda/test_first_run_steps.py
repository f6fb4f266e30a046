"""The steps of a first run on a GPU: what becomes of those that fail, hang or lack a tool."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.cuda.first_run import __main__ as first_run
from lab.cuda.first_run import build, checks, counters, plan, shards, steps, summary, tools
from lab.cuda.first_run.steps import Outcome, Step
from lab.processes import environment

pytestmark = pytest.mark.unpoisoned


PLANTED = """
import os, signal, sys, time
shard, shards, first = map(int, sys.argv[2:5])
without = sys.argv[sys.argv.index("--without") + 1:]
for index in range(shard, 9, shards):
    if index < first or f"way{index % 2}" in without:
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
    monkeypatch.setattr(shards, "_PROCESSES_OF_A_WAY", 9)
    assert shards.main(2, 2, ["table"], "planted") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "FAIL way0 check2: the process ended with status -11",
        "FAIL way0 check4: it hangs, nothing for 2 s",
        "FAIL way0 check6: CUDA error",
        "9 checks, 3 failed: way0 5, way1 4",
    ]


def test_a_way_that_ends_processes_again_and_again_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert shards.main(1, 2, ["table"], "planted") == 1
    assert capsys.readouterr().out.splitlines() == [
        "FAIL way0 check2: the process ended with status -11",
        "FAIL way0 check4: it hangs, nothing for 2 s",
        "FAIL way0 is left out of shard 0 from here on",
        "7 checks, 2 failed: way0 3, way1 4",
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


SLEEP = f"sleep 77.{os.getpid()}"  # no other program's

PLANTED_STEPS = (
    Step("right", 20, program("print('all is well')")),
    Step("wrong", 20, program("print('FAIL mma case 1: off by one'); raise SystemExit(1)")),
    Step("silent", 20, program("print('FAIL mma case 2: off by two')")),
    Step("crashed", 20, program("import os; print('before', flush=True); os.abort()")),
    Step("hanging", 1, program(f"import subprocess; subprocess.run({SLEEP.split()})")),
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
    assert found["fault"].failures == ["Invalid read"]
    assert found["crashed"].reason == "ended by SIGABRT"
    assert found["hanging"].seconds < 20
    assert "/nowhere/tool" in found["impossible"].reason
    assert found["after"].reason == "it needs hanging"
    # What the hanging program had started is ended too.
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False)
    assert SLEEP not in listed.stdout.splitlines()

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
    assert time.monotonic() - begin < 20
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


def test_results_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", "/proc/nowhere")
    assert first_run.main([]) == 2
    assert "OUT: cannot write /proc/nowhere: " in capsys.readouterr().err


@pytest.mark.parametrize("dry", [False, True])
def test_the_programs_take_what_the_plan_gives_them(
    dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that only a GPU runs, too."""
    monkeypatch.setattr(tools, "find", lambda name: f"/usr/bin/{name}")
    kinds = []
    found = [s for s in plan.steps(plan.Folders(tmp_path, tmp_path), dry) if not s.left_out]
    for step in found:
        for command in step.commands:
            programs = [word for word in command if word.startswith("lab.cuda.first_run.")]
            for program in programs:
                assert importlib.util.find_spec(program)
            if not programs or programs[-1].rpartition(".")[2] not in ("checks", "shards"):
                continue
            given = command[command.index(programs[-1]) + 1 :]
            if programs[-1].endswith("shards"):
                assert int(given[0]) >= 1
                assert float(given[1]) > 0
                given = given[2:]
            kinds.append(checks.parse(given).kind)
            assert checks.parse(given).dry == dry
    gpus = ["table", "table", "triton"]  # by memcheck, by racecheck
    assert kinds == ["table", "sizes", "streams", "times"] + ([] if dry else gpus)


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
