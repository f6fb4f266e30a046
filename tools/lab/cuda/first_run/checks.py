"""Runs a list of checks, one shard of several: what `shards` starts, and compute-sanitizer.

``python -m lab.cuda.first_run.checks KIND [SHARD SHARDS FIRST] [OPTION ...]``, with one of `KINDS`.
Prints each check's number and label before it starts, so that whoever ends the process knows at
which; then ``ok``, or the failure. Goes on after a failure, unless that leaves the device's context
unusable: then the exit status is `AGAIN`.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lab.cuda.first_run.steps import FAILURE, SECONDS

AT = "at "
OK = "ok"
LEFT = "left "
RAN = "ran "
AGAIN = 75
KINDS = ("table", "triton", "sizes", "streams", "times")
LONGEST = 300
"""Characters of a failure that are of use."""

_LOST = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")
_SHARE = 0.85  # of the limit, after which no check is begun


class Check(NamedTuple):
    """Raises where something is wrong. The label begins with the way that is checked."""

    label: str
    run: Callable[[], None]


def checks(args: argparse.Namespace) -> Iterable[Check]:
    """Those of a kind. Raises ``RuntimeError`` where there is no device for them."""
    from lab.cuda.first_run import device, sizes, streams, table, times

    if args.kind == "sizes":
        return sizes.checks(device.get(args.dry))
    if args.kind == "streams":
        return streams.checks(device.get(args.dry))
    if args.kind == "times":
        return times.checks(device.get(args.dry), args.file)
    name = "triton" if args.kind == "triton" else "cuda"
    return table.checks(device.get(args.dry, name), args.stride, args.largest)


def is_lost(error: Exception) -> bool:
    """Whether the process can use its device no more."""
    return any(words in str(error) for words in _LOST)


def run(found: Sequence[Check], indices: Iterable[int], end: float) -> int:
    """The exit status: 1 where something failed, or `AGAIN`."""
    failed = done = 0
    for index in indices:
        check = found[index]
        if time.monotonic() > end:
            print(f"{LEFT}{index} {check.label}", flush=True)
            break
        done += 1
        print(f"{AT}{index} {check.label}", flush=True)
        try:
            check.run()
        except Exception as error:  # noqa: BLE001 (whatever it is, the others are of interest)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"{FAILURE}{check.label}: {text[:LONGEST]}", flush=True)
            if is_lost(error):
                return AGAIN
            failed = 1
        else:
            print(OK, flush=True)
    print(f"{RAN}{done} checks", flush=True)
    return failed


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="checks")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("shard", type=int, nargs="?", default=0)
    parser.add_argument("shards", type=int, nargs="?", default=1)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--largest", type=int, default=1 << 40)
    parser.add_argument("--without", nargs="*", default=[], help="ways that are not checked")
    parser.add_argument("--file", type=Path, help="that times are written to")
    parser.add_argument("--shuffle", action="store_true", help="for a run that is cut short")
    args = parser.parse_args(arguments)
    if args.kind == "times" and args.file is None:
        parser.error("--file: times are written to one")
    return args


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    end = time.monotonic() + _SHARE * float(os.environ.get(SECONDS, "inf"))
    try:
        found = list(checks(args))
        if args.shuffle:
            random.Random(0).shuffle(found)
    except (ImportError, RuntimeError) as error:
        print(f"{FAILURE}{args.kind}: {error}", flush=True)
        return 1
    own = range(args.shard, len(found), args.shards)
    left_out = {i for i in own if found[i].label.partition(" ")[0] in args.without}
    return run(found, [i for i in own if i >= args.first and i not in left_out], end)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
