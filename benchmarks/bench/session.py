"""One run: limits, contests, limits again, then the table, the JSON and the plots."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from qkern import testing
from qkern.backends import cpu

from . import kernels, llama_cpp, machine, mixed, models, overhead, peers, plots, report, timing

_MODEL_SECONDS = 300.0
_MODEL_ROUNDS = 3


class Session:
    """What the command line asks for, and what was measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtypes = [getattr(torch, name) for name in args.dtype]
        self.hide_bf16 = args.peer_isa is not None
        self.settings = timing.Settings(
            repeat=args.repeat,
            max_seconds=args.max_seconds,
            cold=args.cache == "cold",
            cache_bytes=machine.cache_bytes(),
        )
        self.buffer_bytes = machine.probe_buffer_bytes(self.settings.cache_bytes)
        self.contests: list[tuple[timing.Problem, list[timing.Sample]]] = []
        self.memory: list[report.Record] = []
        self.notes: list[str] = []
        self.wrong: list[str] = []
        if self.buffer_bytes < 2 * self.settings.cache_bytes:
            self.notes.append("the bandwidth probe's buffer is less than twice the cache")

    def limits(self) -> machine.Limits:
        isa = machine.widest_isa(self.args.peer_isa)
        return machine.measure(self.dtypes, self.args.threads, isa, self.buffer_bytes)

    def workload(self, sequence: int) -> models.Workload:
        args = self.args
        return models.Workload(args.model, args.batch, sequence, args.new_tokens, self.hide_bf16)

    def run(self) -> None:
        for op in self.args.op:
            for dtype in self.dtypes:
                if op in models.OPS:
                    self._run_model(op, dtype)
                else:
                    self._run_kernel(op, dtype)

    def _run_kernel(self, op: str, dtype: torch.dtype) -> None:
        args = self.args
        choice = peers.Choice(tuple(args.isa), tuple(args.peer), args.peer_isa)
        for threads in sorted({1, args.threads}) if op == mixed.OP else [args.threads]:
            torch.set_num_threads(threads)
            for shape in kernels.shapes(op, args):
                for m in kernels.rows(op, args):
                    self._play(*kernels.contest(op, shape, m, dtype, choice), self.settings)
        if choice.isas:
            cpu.set_isa("")  # models take the one that qkern chooses

    def _run_model(self, op: str, dtype: torch.dtype) -> None:
        slow = replace(
            self.settings,
            repeat=self.args.model_repeat,
            min_rounds=_MODEL_ROUNDS,
            max_seconds=_MODEL_SECONDS,
        )
        chosen = tuple(self.args.peer)
        if op in ("generate", models.COMPILED):
            workload = self.workload(self.args.sequence[0])
            contest = models.generation_contest(workload, dtype, chosen, op == models.COMPILED)
            self._play(*contest, slow)
            return
        for sequence in self.args.sequence:
            workload = self.workload(sequence)
            if op == "train_step":
                self._play(*models.training_contest(workload, dtype, chosen), slow)
            else:
                self._measure_memory(workload, dtype)

    def _play(
        self,
        problem: timing.Problem,
        candidates: Sequence[timing.Candidate],
        missing: Sequence[str],
        settings: timing.Settings,
    ) -> None:
        self.notes += [f"{problem}: without {reason}" for reason in missing]
        clock = timing.wall_clock
        if problem.op == overhead.OP:
            clock, settings = overhead.batched_clock, replace(settings, cold=False)
        try:
            samples = timing.run_contest(problem, candidates, settings, clock)
        except timing.WrongResultError as error:
            # The other contests still count; the exit status tells.
            self.wrong.append(f"wrong result, not timed: {error}")
            print(f"run.py: {self.wrong[-1]}", file=sys.stderr, flush=True)
            return
        self.contests.append((problem, samples))
        times = ", ".join(f"{s.name} {s.percentile(50) * 1e3:.4g}" for s in samples)
        print(f"{problem}: ms {times}", file=sys.stderr, flush=True)

    def _measure_memory(self, workload: models.Workload, dtype: torch.dtype) -> None:
        problem = timing.Problem("memory", dtype, (workload.batch, workload.sequence))
        limited = ["--peer-isa", self.args.peer_isa] if self.args.peer_isa else []
        ours = None
        for name in models.names(self.args.peer):
            try:
                found = models.peak_memory_in_subprocess(
                    name, workload, dtype, self.args.threads, limited
                )
            except timing.SkippedError as error:
                self.notes.append(f"{problem}: without {name}: {error}")
                continue
            ours = ours or found
            self.memory.append(report.memory_record(problem, name, found, ours))
            print(f"{problem}: {name} {found}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    torch.set_num_threads(args.threads)
    session = Session(args)
    if unknown := set(args.op) - {*kernels.CONTESTS, *testing.OPS, *models.OPS}:
        print(f"run.py: error: --op: no such op: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if args.memory_of:
        workload = session.workload(args.sequence[0])
        print(json.dumps(models.peak_memory(args.memory_of, workload, session.dtypes[0])))
        return 0
    about = machine.describe(args.threads)
    if "llama.cpp" in args.peer:
        try:
            about["versions"]["ggml"] = llama_cpp.version()
            session.notes += [
                f"llama.cpp's layout {name} left out: it crashed or was wrong in a trial"
                for name in llama_cpp.broken_layouts()
            ]
        except timing.SkippedError as error:
            print(f"run.py: without llama.cpp: {error}", file=sys.stderr)
    limits = session.limits()
    session.run()
    # Other work on the machine can only lower a measured limit: the higher of two counts.
    limits = limits.better_of(session.limits())
    about["load_average_after"] = list(os.getloadavg())
    rows = [row for c in session.contests for row in report.records(*c, limits)] + session.memory
    notes = session.wrong + session.notes
    content = report.content(about, limits, report.settings(args), rows, notes)
    print(report.summary(content))
    if args.json:
        report.write_json(args.json, content)
    if args.plot:
        plots.plot_all(args.plot, content)
    return 1 if session.wrong else 0
