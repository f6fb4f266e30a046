"""`run.py`, from its arguments to the report and the plots: no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import run
import torch
from bench import overview, peers, plots, ratios, report, session, timing

from lab import ROOT

pytestmark = pytest.mark.unpoisoned


def test_crossover():
    rows = [{"name": "dense", "m": m, "ratio": r} for m, r in ((1, 4.0), (16, 0.25), (32, 0.5))]
    assert plots.crossovers(rows) == pytest.approx([4.0])


@pytest.mark.parametrize("emulated", [False, True])
def test_ops_of_many_products_are_left_out_where_those_are_emulated(emulated, monkeypatch):
    monkeypatch.setattr(
        session, "has_cpu_matmul", lambda dtype: dtype is torch.float32 or not emulated
    )
    for arguments, asked in (([], False), (["--dtype", "bfloat16"], True)):
        found = session.Session(run.parse_args(arguments))
        for op in ("loss", "train_step", "forward_backward", "memory", "crowded"):
            assert found._leaves_out(op, torch.bfloat16) == (emulated and not asked)
            assert not found._leaves_out(op, torch.float32)
        assert not found._leaves_out("forward", torch.bfloat16)
        assert len(found.notes) == 5 * (emulated and not asked) + ("probe" in str(found.notes))


def test_run(quick_probes, tmp_path, capsys):
    path = tmp_path / "deep" / "out.json"
    status = run.main(
        [
            *("--op", "dequantize,forward,mixed,overhead"),
            *("--peer", "dense", "--dtype", "bfloat16"),
            *("--shape", "64x64,64x128", "--m", "1,5"),
            *("--threads", "1", "--repeat", "2", "--json", str(path)),
            *("--plot", str(tmp_path / "plots")),
        ]
    )
    assert status == 0
    content = json.loads(path.read_text())
    parts = {"schema", "machine", "limits", "settings", "results", "ratios", "notes", "seconds"}
    assert content.keys() == parts
    assert {"dequantize", "overhead", "all"} <= content["seconds"].keys()
    about = content["machine"]
    assert about["threads"] == 1
    assert about["versions"]["torch"] == torch.__version__
    assert len(about["load_average"]) == len(about["load_average_after"]) == 3
    keys = {"op", "shape", "m", "dtype", "name", "ms", "p20_ms", "p80_ms", "ratio", "cache"}
    assert all(keys <= row.keys() for row in content["results"])
    # of each shape: two candidates and a copy; then for each M two, two loops, and four calls
    assert len(content["results"]) == 2 * (3 + 2 * (2 + 2 + 4))
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    of_run, of_overview, of_ratios = (table.splitlines() for table in tables)
    assert len(of_run) == 2 + len(content["results"])
    assert len({len(line) for line in of_run}) == 1
    assert of_overview[2].startswith("| dequantise, into out= | bfloat16 |")
    assert len(of_ratios) == 2 + len(content["ratios"])
    assert content["ratios"] == ratios.rows(content)
    stems = {file.stem for file in (tmp_path / "plots").iterdir()}
    assert {"roofline-bfloat16", "forward-64x64-bfloat16-over-m"} <= stems
    assert {"forward-m5-bfloat16-over-size", "dequantize-bfloat16-over-size"} <= stems
    assert {"mixed-m1-bfloat16", "overhead-m5-bfloat16"} <= stems


def test_mixed_runs_on_one_thread_too(quick_probes, capsys):
    arguments = ["--op", "mixed", "--peer", "none", "--dtype", "float32", "--shape", "64x64"]
    assert run.main([*arguments, "--m", "1", "--threads", "2", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert "| mixed, 1 thread " in out
    assert "| mixed, 2 threads " in out
    assert " of its parts " in out


def record(op: str, name: str, ms: float, m: int | None = None, **fields) -> dict:
    found = {"op": op, "shape": [64, 64], "m": m, "dtype": "float32", "threads": 2, "name": name}
    times = {"ms": ms, "p20_ms": ms, "p80_ms": ms, "ratio": 1.0, "bytes": 4096, "flops": 0}
    return found | times | fields


@pytest.fixture
def two_files(tmp_path) -> list[Path]:
    """Results of two runs, with one contest that both played."""
    about = {"machine": {"threads": 2}, "settings": {}, "notes": [], "schema": 1}
    step = {"unit": "tokens/s", "bytes": 0, "shape": [4, 256]}
    problem = timing.Problem("memory", torch.float32, (4, 256))
    ours = {"model": 1 << 20, "peak": 1500 << 20}
    first = [
        record("quantize", "qkern", 2.0),
        record("quantize", "bitsandbytes", 50.0),
        record("forward", "qkern", 4.0, 1),
        record("forward", "bitsandbytes", 2.0, 1),
    ]
    second = [
        record("quantize", "qkern", 99.0),
        record("forward", "dense", 1.0, 1),
        record("forward", "qkern", 3.0, 512),
        record("forward", "llama.cpp Q4_0", 1.0, 512),
        record("forward", "dense", 1.0, 7),  # in no line of the overview
        record("train_step", "qkern", 1000.0, rate=1024.0, **step),
        record("train_step", "bitsandbytes", 2000.0, rate=512.0, **step),
        record("train_step", "qkern", 500.0, rate=512.0, **step | {"shape": [4, 64]}),
        *(
            report.memory_record(problem, name, {"model": 1 << 20, "peak": peak << 20}, ours)
            for name, peak in (("qkern", 1500), ("bitsandbytes", 3000))
        ),
    ]
    paths = []
    for number, rows in enumerate((first, second)):
        limits = {"read_gb_s": 10.0 + number, "amx_gflops": None, "matmul_gflops": {}}
        paths.append(tmp_path / f"{number}.json")
        report.write_json(paths[-1], about | {"results": rows, "limits": limits})
    return paths


def test_merged_results(two_files):
    content = overview.merged([json.loads(path.read_text()) for path in two_files])
    # Contestants of one contest took turns, so those of another run are not set beside them.
    rows = [row for row in content["results"] if "ms" in row and row["shape"] != [4, 64]]
    found = {(row["op"], row["m"], row["name"]): row["ms"] for row in rows}
    assert found == {
        ("quantize", None, "qkern"): 2.0,
        ("quantize", None, "bitsandbytes"): 50.0,
        ("forward", 1, "qkern"): 4.0,
        ("forward", 1, "bitsandbytes"): 2.0,
        ("forward", 512, "qkern"): 3.0,
        ("forward", 512, "llama.cpp Q4_0"): 1.0,
        ("forward", 7, "dense"): 1.0,
        ("train_step", None, "qkern"): 1000.0,
        ("train_step", None, "bitsandbytes"): 2000.0,
    }
    assert content["limits"]["read_gb_s"] == 11.0


def test_replot(two_files, tmp_path, capsys):
    plots_at = tmp_path / "plots"
    assert run.main(["--replot", ",".join(map(str, two_files)), "--plot", str(plots_at)]) == 0
    assert {"overview.png", "overview.svg", "train_step.png"} <= {
        p.name for p in plots_at.iterdir()
    }
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = lines.index("", start)
    assert lines[start:end] == [
        "|  |  | qkern | bitsandbytes | llama.cpp Q4_0 | ratio to bitsandbytes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| quantise | float32 | 2 | 50 |  | 25 |",
        "| forward, 1 row | float32 | 4 | 2 |  | 0.5 |",
        "| forward, 512 rows | float32 | 3 |  | 1 |  |",
        "| LoRA training step | float32 | 1,024 tokens/s | 512 tokens/s |  | 2 |",
        "| its peak memory | float32 | 1,500 MiB | 3,000 MiB |  | 2 |",
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[end + 3 : -3]]
    assert [[row[1], row[4], row[0]] for row in cells] == [
        ["forward", "512", "0.33"],
        ["forward", "1", "0.50"],
        ["train_step", "", "2.00"],
        ["memory, peak", "", "2.00"],
        ["quantize", "", "25.00"],
    ]
    assert lines[-3:] == [
        "",
        "5 rows beside their best peer, 2 are below 1.0",
        "without a peer: train_step 4x64 float32",
    ]


@pytest.mark.slow
def test_committed_results_can_be_drawn_again(tmp_path):
    results = ROOT / "benchmarks" / "results"
    files = [p for p in results.glob("*/*.json") if "schema" in json.loads(p.read_text("utf-8"))]
    assert files
    for file in files:
        assert overview.replot([file], tmp_path) == 0


def test_wrong_result_is_the_exit_status(quick_probes, monkeypatch, capsys):
    monkeypatch.setattr(peers.F, "linear", lambda x, w: torch.zeros(len(x), len(w)))
    arguments = ["--op", "forward,dequantize", "--shape", "64x64", "--m", "2", "--peer", "dense"]
    arguments += ["--dtype", "float32", "--threads", "1", "--repeat", "1"]
    assert run.main(arguments) == 1
    out = capsys.readouterr().out
    assert "wrong result, not timed: dense, forward 64x64 float32 M=2" in out
    assert "| dequantize |" in out  # the rest is timed all the same
    assert "| forward " not in out


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        run.main(["--peer", "bitsnbytes"])
    assert "--peer: got bitsnbytes; takes bitsandbytes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--replot", "results.json"])
    assert "--replot: draws into the directory that --plot names" in capsys.readouterr().err
    assert run.main(["--op", "forwards"]) == 2


def test_limited_instruction_set_takes_a_fresh_process(monkeypatch):
    class ReplacedError(Exception):
        pass

    def execve(path, command, environment):
        raise ReplacedError(command, environment)

    monkeypatch.setattr(run.os, "execve", execve)
    with pytest.raises(ReplacedError) as replaced:
        run.main(["--peer-isa", "avx512", "--op", "forward"])
    command, environment = replaced.value.args
    assert command[-4:] == ["--peer-isa", "avx512", "--op", "forward"]
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"
    assert environment["QKERN_CPU_ISA"] == "avx512"
