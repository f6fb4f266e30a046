"""One run: limits, contests, limits again, then the table, the JSON and the plots."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from qkern import testing
from qkern.backends import cpu, has_cpu_matmul

from . import (
    crowded,
    kernels,
    llama_cpp,
    loss,
    machine,
    mixed,
    models,
    overhead,
    overview,
    peak,
    peers,
    report,
    timing,
)

_OF_MANY_PRODUCTS = ("forward_backward", loss.OP, "train_step", "memory", crowded.OP)
"""Ops a call of which takes a peer minutes in a dtype whose products torch emulates."""
_MODEL_SECONDS = 20.0
_MODEL_ROUNDS = 2


class Session:
    """What the command line asks for, and what was measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtypes = [getattr(torch, name) for name in args.dtype]
        self.settings = timing.Settings(
            repeat=args.repeat,
            max_seconds=args.max_seconds,
            cold=args.cache == "cold",
            cache_bytes=machine.cache_bytes(),
        )
        self.slow = replace(
            self.settings,
            repeat=args.model_repeat,
            min_rounds=_MODEL_ROUNDS,
            max_seconds=_MODEL_SECONDS,
            fewest_calls=1,  # each is so many products that it is a mean already
        )
        self.buffer_bytes = machine.probe_buffer_bytes(self.settings.cache_bytes)
        self.contests: list[tuple[timing.Problem, list[timing.Sample]]] = []
        self.records: list[report.Record] = []
        self.notes: list[str] = []
        self.wrong: list[str] = []
        self.seconds: dict[str, float] = {}  # that each op took, checks and preparation too
        if self.buffer_bytes < 2 * self.settings.cache_bytes:
            self.notes.append("the bandwidth probe's buffer is less than twice the cache")

    def limits(self) -> machine.Limits:
        isa = machine.widest_isa(self.args.peer_isa)
        return machine.measure(self.dtypes, self.args.threads, isa, self.buffer_bytes)

    def workload(self, sequence: int) -> models.Workload:
        args = self.args
        return models.Workload(args.model, args.batch, sequence, args.new_tokens, args.peer_isa)

    def run(self) -> None:
        for op in self.args.op:
            start = time.monotonic()
            for dtype in self.dtypes:
                if self._leaves_out(op, dtype):
                    continue
                if op == crowded.OP:
                    self._run_crowded(dtype)
                elif op == loss.OP:
                    self._run_loss(dtype)
                elif op in models.OPS:
                    self._run_model(op, dtype)
                else:
                    self._run_kernel(op, dtype)
            self.seconds[op] = time.monotonic() - start

    def _leaves_out(self, op: str, dtype: torch.dtype) -> bool:
        args = self.args
        if args.every_dtype or op not in _OF_MANY_PRODUCTS or has_cpu_matmul(dtype):
            return False
        self.notes.append(
            f"{op}: left out in {dtype}, whose products torch emulates here, so that a call takes "
            "a peer minutes; with --dtype it is measured"
        )
        return True

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
        chosen = tuple(self.args.peer)
        if op in ("generate", models.COMPILED):
            workload = self.workload(self.args.sequence[0])
            contest = models.generation_contest(workload, dtype, chosen, op == models.COMPILED)
            self._play(*contest, self.slow)
            return
        for sequence in self.args.sequence:
            workload = self.workload(sequence)
            if op == "train_step":
                self._play(*models.training_contest(workload, dtype, chosen), self.slow)
            else:
                self._measure_memory(workload, dtype)

    def _run_loss(self, dtype: torch.dtype) -> None:
        for shape, m in kernels.losses(self.args):
            self._play(*loss.contest(shape, m, dtype, tuple(self.args.peer)), self.slow)
            problem = timing.Problem(loss.OP, dtype, shape, m)
            names = [name for name in loss.NAMES if name != "dense" or name in self.args.peer]
            arguments = ["--op", loss.OP, "--shape", "x".join(map(str, shape)), "--m", str(m)]
            arguments += ["--dtype", problem.dtype_name, "--threads", str(self.args.threads)]
            arguments += self._limited()
            measure = partial(peak.in_subprocess, arguments=arguments)
            self._measure_peaks(problem, names, measure)

    def _limited(self) -> list[str]:
        return ["--peer-isa", self.args.peer_isa] if self.args.peer_isa else []

    def _run_crowded(self, dtype: torch.dtype) -> None:
        chosen = tuple(self.args.peer)
        choice = peers.Choice((), chosen, self.args.peer_isa)
        for shape in kernels.shapes(crowded.OP, self.args):
            for m in kernels.rows(crowded.OP, self.args):
                self._play_crowded(*crowded.forward_contest(shape, m, dtype, choice))
        if dtype != self.dtypes[0]:
            return  # a generation's loss comes from its many short calls, not from their dtype
        workload = self.workload(self.args.sequence[0])
        self._play_crowded(*crowded.generation_contest(workload, dtype, chosen))

    def _play_crowded(
        self,
        problem: timing.Problem,
        candidates: Sequence[timing.Candidate],
        missing: Sequence[str],
    ) -> None:
        self.notes += [f"{problem}: without {reason}" for reason in missing]
        try:
            found = crowded.play(problem, candidates, self.settings)
        except timing.WrongResultError as error:
            self._note_wrong(error)
            return
        self.records += found
        times = ", ".join(f"{r['name']} {r['ms']:.4g}, {r['times_slower']:.2f}x" for r in found)
        print(f"{problem}: ms {times}", file=sys.stderr, flush=True)

    def _note_wrong(self, error: timing.WrongResultError) -> None:
        # The other contests still count; the exit status tells.
        self.wrong.append(f"wrong result, not timed: {error}")
        print(f"run.py: {self.wrong[-1]}", file=sys.stderr, flush=True)

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
            self._note_wrong(error)
            return
        self.contests.append((problem, samples))
        times = ", ".join(f"{s.name} {s.percentile(50) * 1e3:.4g}" for s in samples)
        print(f"{problem}: ms {times}", file=sys.stderr, flush=True)

    def _measure_memory(self, workload: models.Workload, dtype: torch.dtype) -> None:
        problem = timing.Problem("memory", dtype, (workload.batch, workload.sequence))
        threads, limited = self.args.threads, self._limited()
        self._measure_peaks(
            problem,
            models.steps(self.args.peer),
            lambda name: models.peak_memory_in_subprocess(name, workload, dtype, threads, limited),
        )

    def _measure_peaks(
        self,
        problem: timing.Problem,
        names: Sequence[str],
        measure: Callable[[str], dict[str, int]],
    ) -> None:
        ours = None
        for name in names:
            try:
                found = measure(name)
            except timing.SkippedError as error:
                self.notes.append(f"{problem}: without {name}: {error}")
                continue
            ours = ours or found
            self.records.append(report.memory_record(problem, name, found, ours))
            print(f"{problem}: {name} {found}", file=sys.stderr, flush=True)


def _peak_memory(session: Session) -> dict[str, int]:
    args, dtype = session.args, session.dtypes[0]
    if args.op == [loss.OP]:
        return loss.peak_memory(args.memory_of, args.shape[0], args.m[0], dtype)
    return models.peak_memory(args.memory_of, session.workload(args.sequence[0]), dtype)


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    torch.set_num_threads(args.threads)
    session = Session(args)
    known = {*kernels.CONTESTS, *testing.OPS, *models.OPS, crowded.OP, loss.OP}
    if unknown := set(args.op) - known:
        print(f"run.py: error: --op: no such op: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if args.memory_of:
        print(json.dumps(_peak_memory(session)))
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
    start = time.monotonic()
    limits = session.limits()
    session.run()
    # Other work on the machine can only lower a measured limit: the higher of two counts.
    limits = limits.better_of(session.limits())
    about["load_average_after"] = list(os.getloadavg())
    rows = [row for c in session.contests for row in report.records(*c, limits)] + session.records
    notes = session.wrong + session.notes
    seconds = session.seconds | {"all": time.monotonic() - start}
    content = report.content(about, limits, report.settings(args), rows, notes, seconds)
    overview.publish(args, content)
    return 1 if session.wrong else 0
