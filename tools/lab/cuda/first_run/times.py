"""Times of products on every path, beside dense weights, bitsandbytes and what the model expects.

``python -m lab.cuda.first_run.times FILE [--dry]``. The file is written after each shape, so that a
run cut short leaves what it had. Its records are those of ``benchmarks/run.py``, with the path that
a call took, the one that is chosen, and the modelled time.
"""

from __future__ import annotations

import os
import sys
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
from lab.cuda.first_run import device as devices
from lab.cuda.first_run import model
from lab.cuda.first_run.checks import LONGEST
from lab.cuda.first_run.device import Device
from lab.cuda.first_run.products import Shape, multiply, possible, quantized, random
from lab.cuda.first_run.steps import FAILURE, SECONDS
from qkern import testing
from qkern.backends._cuda_paths import PATHS, Matmul

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
ROWS = tuple(1 << i for i in range(13))
DRY_SHAPES, DRY_ROWS = ((96, 128), (32, 64)), (1, 4)
DTYPE = torch.bfloat16
SETTINGS = timing.Settings(repeat=25, max_seconds=0.5, min_rounds=3, cold=False)
DRY_SETTINGS = replace(SETTINGS, repeat=2, max_seconds=0.05, min_rounds=2)
OURS = "qkern"
"""The path that is chosen; others are this and a path."""

_CHECKED_ROWS = 64
_TOLERANCE = 0.02
_SHARE = 0.85  # of the limit, after which no problem is begun
_DRY_PROBE = {"probe_bytes": 1 << 16, "size": 32}


class Times:
    """All that is measured, and the file."""

    def __init__(self, device: Device, file: Path, end: float) -> None:
        self.device, self.file, self.end = device, file, end
        self.settings = DRY_SETTINGS if device.dry else SETTINGS
        self.clock = device.clock()
        probe = _DRY_PROBE if device.dry else {}
        self.limits = gpu.limits([DTYPE], self.clock, device.device, **probe)
        self.rows: list[report.Record] = []
        self.notes: list[str] = []
        self.failed = 0
        self.seconds: dict[str, float] = {}
        threads = torch.get_num_threads()
        self.about = machine.describe(threads) if device.dry else gpu.describe(device.device)
        variables = self.about["environment"].items()
        # Paths are of no use to who reads the file elsewhere.
        self.about["environment"] = {k: v for k, v in variables if os.sep not in v}

    def run(self) -> int:
        """The exit status."""
        for shape in DRY_SHAPES if self.device.dry else SHAPES:
            begin = time.monotonic()
            self.about["megahertz"] = self.device.megahertz()
            with self.device.target.activate(), torch.no_grad():
                self._dequantize(shape)
                for m in DRY_ROWS if self.device.dry else ROWS:
                    for dx in (False, True):
                        self._multiply(shape, m, dx)
            self.seconds["x".join(map(str, shape))] = time.monotonic() - begin
            self.write()
        for note in dict.fromkeys(self.notes):
            print(note)
        print(f"{len(self.rows)} times, {self.failed} failed")
        return bool(self.failed)

    def write(self) -> None:
        self.about["load_average_after"] = list(os.getloadavg())
        found = report.content(
            *(self.about, self.limits, asdict(self.settings)),
            *(self.rows, self.notes, self.seconds),
        )
        report.write_json(self.file, found)

    def _dequantize(self, shape: Shape) -> None:
        problem, candidates, missing = gpu.contest(
            "dequantize", shape, 1, DTYPE, gpu.PEERS, self.device.device
        )
        self.notes += [f"{problem}: without {reason}" for reason in missing]
        self._play(problem, candidates, {})

    def _multiply(self, shape: Shape, m: int, dx: bool) -> None:
        call = Matmul(dx, DTYPE, m, *shape)
        case = testing.Case((m, *shape), DTYPE, double_quant=True)
        spec = testing.OPS["linear_4bit_dx" if dx else "linear_4bit"]
        problem = timing.Problem("dx" if dx else "forward", DTYPE, shape, m, spec.flops(case))
        if time.monotonic() > self.end:
            self.notes.append(f"{problem}: not timed, the time was over")
            return
        paths = tuple(way for way in possible(self.device, call) if way in PATHS)
        expected = model.of(self.device, call, paths, self.about["megahertz"])
        made = list(self._candidates(call, paths, spec.bytes(case)))
        paths_of = {OURS: expected.chosen} | {f"{OURS} {path}": path for path in paths}
        extra = {
            name: {"path": path, "chosen": expected.chosen, "modelled_ms": expected.ms[path]}
            for name, path in paths_of.items()
        }
        self._play(problem, made, extra)

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
        except timing.SkippedError as error:
            self.notes.append(f"without bitsandbytes: {error}")

    def _is_right(self, problem: timing.Problem, candidate: timing.Candidate) -> bool:
        """Whether a call of it gives what it must; else that is said, and counted."""
        try:
            timing.prepare(problem, [candidate], self.settings)
            self.device.synchronize()
        except Exception as error:  # noqa: BLE001 (a peer's, too, and the others count)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
            print(f"{FAILURE}{candidate.name} {problem}: {text}", flush=True)
            self.failed += 1
            return False
        return True

    def _play(
        self,
        problem: timing.Problem,
        candidates: Sequence[timing.Candidate],
        extra: dict[str, dict[str, Any]],
    ) -> None:
        """Each candidate is tried by itself first: what fails is said, and the others are timed."""
        right = [candidate for candidate in candidates if self._is_right(problem, candidate)]
        if not right:
            return
        samples = timing.run_contest(problem, right, self.settings, self.clock)
        cache = "warm" if self.device.dry else "cold"  # which the clock sees to
        samples = [replace(sample, cache=cache) for sample in samples]
        for row in report.records(problem, samples, self.limits):
            self.rows.append(row | extra.get(row["name"], {}))
        found = ", ".join(f"{s.name} {s.percentile(50) * 1e3:.4g}" for s in samples)
        print(f"{problem}: ms {found}", flush=True)


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


def main(file: Path, dry: bool) -> int:
    """The exit status."""
    end = time.monotonic() + _SHARE * float(os.environ.get(SECONDS, "inf"))
    try:
        device = devices.get(dry)
    except RuntimeError as error:
        print(f"{FAILURE}{error}")
        return 1
    return Times(device, file, end).run()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--dry" in sys.argv[2:]))
