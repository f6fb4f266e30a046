"""The benchmarks of a CUDA device, played on a CPU, with another clock; and the static figures."""

from __future__ import annotations

import json

import gpu_static
import pytest
import run
import torch
from bench import gpu, report, timing

from lab import ROOT
from qkern import testing

pytestmark = pytest.mark.unpoisoned
CPU = torch.device("cpu")


class Clock:
    """A second a call; counts them."""

    calls = 0

    def __call__(self, call):
        call()
        self.calls += 1
        return 1.0


def arguments(*extra: str):
    common = ["--device", "cuda", "--shape", "96x128", "--repeat", "3", "--m", "2,40"]
    return run.parse_args([*common, *extra])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contest_has_checked_results_of_all_candidates(dtype):
    clock = Clock()
    contests, notes, wrong = gpu.play(arguments("--dtype", dtype), CPU, clock)
    assert not wrong
    assert not notes
    assert [str(problem) for problem, _ in contests] == [
        f"quantize 96x128 {dtype}",
        f"dequantize 96x128 {dtype}",
        *(f"{op} 96x128 {dtype} M={m}" for op in ("forward", "forward_backward") for m in (2, 40)),
    ]
    names = {problem.op: [s.name for s in samples] for problem, samples in contests}
    assert names["forward_backward"] == ["qkern", "bitsandbytes", "dense"]
    assert clock.calls == 3 * sum(len(samples) for _, samples in contests)
    limits = gpu.limits([torch.bfloat16], Clock(), CPU, probe_bytes=1 << 16, size=32)
    for problem, samples in contests:
        for row in report.records(problem, samples, limits):
            assert row["ms"] == 1000.0
            assert row["cache"] == "cold"


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu.qkern, "linear_4bit", lambda x, qw: x.new_zeros(len(x), qw.shape[0]))
    contests, _, wrong = gpu.play(arguments("--op", "forward"), CPU, Clock())
    assert not contests
    assert len(wrong) == 4


def test_without_a_device_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run.main(["--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


class Stream:
    """A device that does what is launched in order, and a host that takes its own time.

    Times are in microseconds; a cycle is a thousandth of one.
    """

    def __init__(self, monkeypatch):
        self.now = 0.0  # the host's
        self.free = 0.0  # when the device has done all
        stream = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(stream.free, stream.now)

            def query(self):
                return stream.now >= self.at

            def synchronize(self):
                stream.now = max(stream.now, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        properties = type("Properties", (), {"L2_cache_size": 64})
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(2, cycles / 1e3))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(gpu.time, "perf_counter", lambda: self.now / 1e6)

    def launch(self, host, device):
        """A kernel, which the host takes some time to launch and the device to run."""
        self.now += host
        self.free = max(self.free, self.now) + device

    def wait(self):
        self.now = max(self.now, self.free)


def test_a_devices_time_has_none_of_the_hosts(monkeypatch):
    stream = Stream(monkeypatch)
    clock = gpu.EventClock(CPU, cold=True)
    for kernels in (1, 3, 40):  # the last takes the host longer than the stream is first kept busy

        def call(kernels=kernels):
            for _ in range(kernels):
                stream.launch(22, 7)

        found = clock(call)
        assert found.device * 1e6 == pytest.approx(7 * kernels)
        assert found.host * 1e6 == pytest.approx(22 * kernels)


def test_a_call_that_waits_for_the_device_is_timed_with_the_waiting(monkeypatch):
    stream = Stream(monkeypatch)
    clock = gpu.EventClock(CPU, cold=False)

    def call():
        stream.launch(22, 7)
        stream.wait()
        stream.launch(22, 7)

    found = clock(call)
    assert found.device * 1e6 == pytest.approx(7 + 22 + 7)
    assert found.host * 1e6 < 2 * 22 + 20 + 7  # of which it waits as long as the stream is busy
    # The next one is not kept waiting as long.
    before = stream.now
    clock(lambda: stream.launch(5, 7))
    assert stream.now - before < 100


def test_the_hosts_time_is_a_column_of_its_own():
    problem = timing.Problem("forward", torch.float32, (8, 8), 1)
    sample = timing.Sample("qkern", 64, 64, False, 1, "warm", 0.0)
    for device, host in ((3e-6, 8e-6), (5e-6, 9e-6), (4e-6, 30e-6)):
        sample.add(timing.Times(device, host))
    limits = gpu.limits([], lambda call: timing.Times(1.0, 5.0), CPU, probe_bytes=64, size=2)
    assert limits.copy_gb_s == pytest.approx(64e-9)
    (row,) = report.records(problem, [sample], limits)
    assert (row["ms"], row["host_us"]) == (pytest.approx(4e-3), pytest.approx(9.0))
    header, _, cells = report.table([row]).splitlines()
    at = header.split("|").index(next(c for c in header.split("|") if c.strip() == "host us"))
    assert cells.split("|")[at].strip() == "9"
    del row["host_us"]
    assert "host us" not in report.table([row])


def entry(library: str, op: str, **fields) -> gpu_static.Entry:
    values = {
        "registers": 64,
        "local_accesses": 0,
        "loop_instructions": 100,
        "instructions_a_weight": None,
        "instructions_a_kilo_multiply_add": None,
        "cycles_a_kilo_multiply_add": None,
        "wavefronts_a_weight": None,
        "wavefronts_a_kilo_multiply_add": None,
        "alu_a_weight": None,
        "alu_a_kilo_multiply_add": None,
        "tile_rows": 0,
        "tile_columns": 0,
        "loop_accesses": {},
        "conflicting_shared_accesses": 0,
        "occupancy": None,
    }
    return gpu_static.Entry(library, op, f"{library}_kernel", 80, **values | fields)


H100 = next(g for g in gpu_static.GPUS if g.name.startswith("H100"))
A100 = next(g for g in gpu_static.GPUS if g.name.startswith("A100"))


def test_the_model_takes_the_longest_of_its_limits():
    few = entry("qkern", "dequantize", instructions_a_weight=8.0)
    weights = 4096 * 14336
    time = gpu_static.modelled(few, A100, 4096, 14336, 1)
    assert time["bound"] == "memory"
    assert time["modelled_us"] == pytest.approx(weights * 2.51587 / 2039e9 * 1e6, rel=1e-4)
    many = gpu_static.modelled(
        entry("qkern", "dequantize", instructions_a_weight=50.0), A100, 4096, 14336, 1
    )
    assert many["bound"] == "issue"
    assert many["modelled_us"] == pytest.approx(weights * 50 / 32 / (4 * 108 * 1.41e9) * 1e6)
    assert many["roofline_us"] == time["roofline_us"]


def test_the_model_knows_tiles_and_shared_memory():
    weights = 4096 * 14336
    values = {"instructions_a_kilo_multiply_add": 1.0, "tile_rows": 128}
    busy = entry("qkern", "dx", **values, wavefronts_a_kilo_multiply_add=1.5)
    time = gpu_static.modelled(busy, A100, 4096, 14336, 130)
    assert time["bound"] == "shared"
    assert time["modelled_us"] == pytest.approx(weights * 0.256 * 1.5 / (108 * 1.41e9) * 1e6)
    plain = entry("qkern", "dx", **values, wavefronts_a_kilo_multiply_add=0.5)
    time = gpu_static.modelled(plain, A100, 4096, 14336, 130)
    assert time["bound"] == "tensor"
    assert time["modelled_us"] == pytest.approx(2 * 256 * weights / 312e12 * 1e6)
    permutes = entry("qkern", "dx", **values, alu_a_kilo_multiply_add=4.0)
    time = gpu_static.modelled(permutes, A100, 4096, 14336, 130)
    assert time["bound"] == "alu"
    assert time["modelled_us"] == pytest.approx(weights * 0.256 * 4 / (2 * 108 * 1.41e9) * 1e6)
    look_ups = entry("qkern", "forward M=1", instructions_a_weight=4.0, wavefronts_a_weight=2.0)
    time = gpu_static.modelled(look_ups, A100, 4096, 14336, 1)
    assert time["bound"] == "shared"
    assert time["modelled_us"] == pytest.approx(weights / 16 / (108 * 1.41e9) * 1e6)


def test_the_model_of_hoppers_products():
    """At the peak of their own instruction, unless x and W come too slowly from the cache."""
    values = {"instructions_a_kilo_multiply_add": 1.0, "tile_rows": 256, "tile_columns": 128}
    weights = 4096 * 14336
    hopper = entry(gpu_static.HOPPER, "forward", **values)
    time = gpu_static.modelled(hopper, H100, 4096, 14336, 512)
    assert time["bound"] == "cache"
    moved = 2 * 256 + 128 * gpu_static.BYTES_A_WEIGHT  # of a block, for 256 x 128 multiply-adds
    seconds = 512 * weights * moved / (256 * 128) / (28 * 132 * 1.83e9)
    assert time["modelled_us"] == pytest.approx(seconds * 1e6)
    assert time["tensor_share"] == pytest.approx(2 * 512 * weights / 989e12 / seconds)
    wide = entry(gpu_static.HOPPER, "dx", **values | {"tile_rows": 128, "tile_columns": 256})
    time = gpu_static.modelled(wide, H100, 4096, 14336, 256)
    assert time["bound"] == "tensor"
    assert time["tensor_share"] == pytest.approx(1.0)
    usual = gpu_static.modelled(entry("qkern", "dx", **values), H100, 4096, 14336, 256)
    assert usual["tensor_share"] == pytest.approx(0.63)


def test_bytes_a_weight_are_those_of_the_op_table():
    case = testing.Case((4096, 4096), torch.bfloat16, 64, double_quant=True)
    exact = testing.OPS["dequantize_4bit"].bytes(case) / case.numel
    assert pytest.approx(exact, rel=1e-4) == gpu_static.BYTES_A_WEIGHT + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_bytes_of_a_step_are_those_of_the_op_table(dtype, bits):
    case = testing.Case((4096, 4096), dtype, 256, bits=bits)
    exact = testing.OPS["adamw_step"].bytes(case) / case.numel
    names = {torch.float32: "float", torch.bfloat16: "BFloat16", 32: "float", 8: "unsigned char"}
    assert gpu_static.budget.step_bytes(names[dtype], names[bits]) == pytest.approx(exact, rel=1e-3)


def test_a_step_is_modelled_by_its_own_bytes():
    time = gpu_static.modelled(
        entry("qkern", "adamw 8 bits", instructions_a_weight=82.0), A100, 4096, 14336, 1
    )
    assert time["bound"] == "memory"
    moved = 4096 * 14336 * gpu_static.STEP_BYTES["adamw 8 bits"]
    assert time["modelled_us"] == pytest.approx(moved / 2039e9 * 1e6)


def test_committed_static_figures_are_of_this_model():
    path = ROOT / "benchmarks/results/gpu-static/gpu_static.json"
    content = json.loads(path.read_text())
    entries = [gpu_static.Entry(**kernel) for kernel in content["kernels"]]
    assert {e.library for e in entries} == set(gpu_static.COLOURS)
    batch = sorted({time["m"] for time in content["modelled_times"]} - {1})
    times = gpu_static.models(entries, *content["shape"], batch)
    assert times == content["modelled_times"]
    ours = [time for time in times if time["library"] in (gpu_static.QKERN, gpu_static.HOPPER)]
    assert "shared" not in {time["bound"] for time in ours}
    hopper = [t for t in ours if t["library"] == gpu_static.HOPPER and t["m"] >= 256]
    assert {(time["gpu"], time["op"], time["m"]) for time in hopper} == {
        (gpu, op, m)
        for gpu in ("H100 SXM", "H200 SXM")
        for op in ("forward", "dx")
        for m in (256, 512)
    }
    assert min(time["tensor_share"] for time in hopper) >= 0.7
    assert path.with_suffix(".png").exists()
