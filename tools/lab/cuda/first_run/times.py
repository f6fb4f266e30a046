"""Times of products on every path, beside dense weights, bitsandbytes and what the model expects.

Each check is a contest on one problem. The file is written after each, and one that is there is
gone on with, so that a process that ends loses no more than its contest. Its records are those of
``benchmarks/run.py``, with the path that a call took, the one that is chosen, and the modelled
time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import gpu, machine, matmul, peers, report, timing, weights
from torch import Tensor
from torch.nn import functional as F

import qkern
from lab.cuda import ways
from lab.cuda.first_run import model
from lab.cuda.first_run.checks import LONGEST, Check, is_lost
from lab.cuda.first_run.device import Device
from lab.cuda.first_run.differences import OURS, size
from lab.cuda.first_run.products import Shape, multiply, possible, quantized, random
from qkern import testing
from qkern.backends._cuda_paths import PATHS, Matmul

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
ROWS = tuple(1 << i for i in range(13))
DRY_SHAPES, DRY_ROWS = ((96, 128), (32, 64)), (1, 4)
DTYPE = torch.bfloat16
SETTINGS = timing.Settings(repeat=25, max_seconds=0.5, min_rounds=3, cold=False)
DRY_SETTINGS = replace(SETTINGS, repeat=2, max_seconds=0.05, min_rounds=2)
_ENDED = "left out, having ended or held up a process: "
_CHECKED_ROWS = 64
_TOLERANCE = 0.02
_DRY_PROBE = {"probe_bytes": 1 << 16, "size": 32}


class Times:
    """All that is measured, and the file."""

    def __init__(self, device: Device, file: Path) -> None:
        self.device, self.file = device, file
        self.settings = DRY_SETTINGS if device.dry else SETTINGS
        self.clock = device.clock()
        probe = _DRY_PROBE if device.dry else {}
        self.limits = gpu.limits([DTYPE], self.clock, device.device, **probe)
        threads = torch.get_num_threads()
        self.about = machine.describe(threads) if device.dry else gpu.describe(device.device)
        variables = self.about["environment"].items()
        # Paths are of no use to who reads the file elsewhere.
        self.about["environment"] = {k: v for k, v in variables if os.sep not in v}
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.rows: list[report.Record] = before.get("results", [])
        self.notes: list[str] = before.get("notes", [])
        self.seconds: dict[str, float] = before.get("seconds", {})
        self.trying = file.with_suffix(".trying")
        self.without = self._without()

    def _without(self) -> set[str]:
        """Candidates at whose first call a process ended or hung: it left the name in `trying`."""
        if self.trying.exists():
            self.notes.append(f"{_ENDED}{self.trying.read_text(encoding='utf-8')}")
            self.trying.unlink()
        return {note.removeprefix(_ENDED) for note in self.notes if note.startswith(_ENDED)}

    def checks(self) -> Iterator[Check]:
        """Shape by shape, so that neighbours share a weight."""
        for shape in DRY_SHAPES if self.device.dry else SHAPES:
            yield self._check(f"dequantize {size(shape)}", partial(self._dequantize, shape))
            for m in DRY_ROWS if self.device.dry else ROWS:
                for dx in (False, True):
                    label = f"{'dx' if dx else 'forward'} {size(shape)} M={m}"
                    yield self._check(label, partial(self._multiply, shape, m, dx))

    def _check(self, label: str, contest: Callable[[], list[str]]) -> Check:
        def run() -> None:
            begin = time.monotonic()
            with self.device.context(), torch.no_grad():
                wrong = contest()
            op = label.partition(" ")[0]
            self.seconds[op] = self.seconds.get(op, 0.0) + time.monotonic() - begin
            self.write()
            if wrong:
                raise AssertionError("; ".join(wrong))

        return Check(f"times {label}", run)

    def write(self) -> None:
        self.about["load_average_after"] = list(os.getloadavg())
        found = report.content(
            *(self.about, self.limits, asdict(self.settings)),
            *(self.rows, self.notes, self.seconds),
        )
        report.write_json(self.file, found)

    def _dequantize(self, shape: Shape) -> list[str]:
        contest = partial(gpu.contest, "dequantize", shape, 1, DTYPE)
        try:
            problem, candidates, missing = contest(gpu.PEERS, self.device.device)
        except Exception as error:  # noqa: BLE001 (whatever keeps a peer from running here)
            self.notes.append(f"dequantize without peers: {_in_a_line(error)}")
            problem, candidates, missing = contest((), self.device.device)
        self.notes += [f"without {reason}" for reason in missing]
        return self._play(problem, candidates, {})

    def _multiply(self, shape: Shape, m: int, dx: bool) -> list[str]:
        call = Matmul(dx, DTYPE, m, *shape)
        case = testing.Case((m, *shape), DTYPE, double_quant=True)
        spec = testing.OPS["linear_4bit_dx" if dx else "linear_4bit"]
        problem = timing.Problem("dx" if dx else "forward", DTYPE, shape, m, spec.flops(case))
        paths = tuple(way for way in possible(self.device, call) if way in PATHS)
        megahertz = self.about["megahertz"] = self.device.megahertz()
        expected = model.of(self.device, call, paths, megahertz)
        paths_of = {OURS: expected.chosen} | {f"{OURS} {path}": path for path in paths}
        extra = {
            name: {"path": path, "chosen": expected.chosen, "modelled_ms": expected.ms[path]}
            for name, path in paths_of.items()
        }
        return self._play(problem, list(self._candidates(call, paths, spec.bytes(case))), extra)

    def _candidates(
        self, call: Matmul, paths: Sequence[str], size: int
    ) -> Iterator[timing.Candidate]:
        shape = call.out_features, call.in_features
        qw = quantized(self.device, shape)
        x = random(self.device, call.rows, shape[0 if call.dx else 1]).to(DTYPE)
        dense = qw.dequantize(DTYPE)
        at = weights.spread(len(x), _CHECKED_ROWS).to(x.device)
        factor = dense.float() if call.dx else dense.float().t()
        check = partial(_near, at, x[at].float() @ factor)

        def candidate(name: str, work: Callable[[], Tensor], more: int = 0) -> timing.Candidate:
            return timing.Candidate(name, lambda: work, check, size + more, qw.nbytes)

        def forced(path: str) -> Tensor:
            with ways.forced(path):
                return multiply(qw, x, call.dx)

        yield candidate(OURS, partial(multiply, qw, x, call.dx))
        for path in paths:
            yield candidate(f"{OURS} {path}", partial(forced, path))
        theirs = (lambda: x @ dense) if call.dx else (lambda: F.linear(x, dense))
        yield candidate("dense", theirs, dense.nbytes - qw.nbytes)
        try:
            yield candidate("bitsandbytes", _bitsandbytes(qw, x, call.dx))
        except Exception as error:  # noqa: BLE001 (whatever keeps it from running here)
            self.notes.append(f"without bitsandbytes: {_in_a_line(error)}")

    def _play(
        self,
        problem: timing.Problem,
        candidates: Sequence[timing.Candidate],
        extra: dict[str, dict[str, Any]],
    ) -> list[str]:
        """Each candidate is tried by itself first; what is wrong with ours, the others are timed.

        What is wrong with a peer is a note.
        """
        right, wrong = [], []
        for candidate in (c for c in candidates if c.name not in self.without):
            fault = self._fault(problem, candidate)
            if fault is None:
                right.append(candidate)
            elif candidate.name.startswith(OURS):
                wrong.append(f"{candidate.name}: {fault}")
            else:
                self.notes.append(f"{problem}: without {candidate.name}: {fault}")
        if right:
            samples = timing.run_contest(problem, right, self.settings, self.clock)
            cache = "warm" if self.device.dry else "cold"  # which the clock sees to
            samples = [replace(sample, cache=cache) for sample in samples]
            for row in report.records(problem, samples, self.limits):
                self.rows.append(row | extra.get(row["name"], {}))
            found = ", ".join(f"{s.name} {s.percentile(50) * 1e3:.4g}" for s in samples)
            print(f"{problem}: ms {found}", flush=True)
        return wrong

    def _fault(self, problem: timing.Problem, candidate: timing.Candidate) -> str | None:
        """What is wrong with a call of it; None where nothing is. Raises if the device is lost."""
        self.trying.write_text(candidate.name, encoding="utf-8")
        fault = None
        try:
            timing.prepare(problem, [candidate], self.settings)
            self.device.synchronize()
        except Exception as error:
            if is_lost(error):
                raise
            fault = _in_a_line(error)
        self.trying.unlink()
        return fault


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]


def _near(at: Tensor, exact: Tensor, y: Tensor) -> None:
    matmul.assert_near(y[at], exact, _TOLERANCE)


def _bitsandbytes(qw: qkern.QuantizedTensor, x: Tensor, dx: bool) -> Callable[[], Tensor]:
    """Its forward, and what its backward does; raises `SkippedError` where it is missing."""
    module = peers.bitsandbytes()
    packed, state = peers.to_bitsandbytes(qw, DTYPE)
    state.to(qw.device)
    if dx:
        return lambda: x @ module.functional.dequantize_4bit(packed, state)
    return lambda: module.matmul_4bit(x, packed.t(), state)


def checks(device: Device, file: Path) -> Iterator[Check]:
    """All contests, measured into ``file``."""
    return Times(device, file).checks()
