"""Choosing a matmul's tile by measuring, where ``QKERN_TRITON_TUNE`` names a file for the choices.

Off by default: the choices of ``launch`` need no measuring and are the same in every process. On,
the first call of each kind of problem times every tile that ``launch`` has for it, and the file
keeps the fastest. Batch-invariant calls are never tuned, nor are calls that a CUDA graph captures,
nor products by experts: which tile is fastest goes by who has how many rows, anew at every call.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from qkern.triton_kernels import launch

_CHOICES: dict[Path, dict[str, list[int]]] = {}
"""What was read from or written to each file: problem to tile. Replaced, never changed."""

_MEASURING = threading.Lock()
"""Of two threads that measure at once, each would measure the other too."""


def milliseconds(start: Callable[[], None]) -> float:
    """Median time of a call on the current device."""
    return float(triton.testing.do_bench(start, return_mode="median"))


def _read(file: Path) -> dict[str, list[int]]:
    """The choices in a file, none where there is no file; ``ValueError`` where it has others."""
    try:
        found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"QKERN_TRITON_TUNE: got {str(file)!r}, which cannot be read ({error}); takes a file "
            "that it wrote, or a new one"
        ) from error
    if not isinstance(found, dict) or not all(map(_is_tile, found.values())):
        raise ValueError(
            f"QKERN_TRITON_TUNE: got {str(file)!r}, which has no tiles; takes a file that it "
            "wrote, or a new one"
        )
    return found


def _is_tile(value: object) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [int] * 4


def matmul(
    op: str,
    start: Callable[[launch.Matmul], None],
    target: launch.Target,
    dtype: torch.dtype,
    rows: int,
    out: int,
    depth: int,
    batch_invariant: bool,
) -> launch.Matmul:
    """The launch for a problem: ``launch.matmul``'s choice, or with the fastest tile.

    ``start`` runs the problem with a launch, and may be called to measure.
    """
    path = os.environ.get("QKERN_TRITON_TUNE")
    if not path or batch_invariant:
        return launch.matmul(target, dtype, rows, out, depth, batch_invariant)
    file = Path(path)
    # Numbers of rows between two powers of two have the same best tile, nearly.
    problem = (
        f"{op} {target.kind} {target.arch} {dtype} {1 << (rows - 1).bit_length()} {out} {depth}"
    )
    tile = _choices(file).get(problem)
    if tile is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return launch.matmul(target, dtype, rows, out, depth)
        with _MEASURING:
            tile = _choices(file).get(problem)
            if tile is None:
                times: dict[launch.Tile, float] = {}
                for candidate in launch.tiles(target, dtype):
                    config = launch.matmul_of(target, dtype, candidate, rows, out, depth)
                    times[candidate] = milliseconds(functools.partial(start, config))
                fastest = min(times.items(), key=lambda item: item[1])[0]
                tile = _kept(file, problem, list(fastest))
    a, b, c, d = tile
    return launch.matmul_of(target, dtype, (a, b, c, d), rows, out, depth)


def _choices(file: Path) -> dict[str, list[int]]:
    choices = _CHOICES.get(file)
    if choices is None:
        choices = _CHOICES.setdefault(file, _read(file))
    return choices


def _kept(file: Path, problem: str, tile: list[int]) -> list[int]:
    """The tile that the file has for a problem from now on: ``tile``, or what it got meanwhile."""
    from qkern.io import _files  # not for those that tune nothing

    with _files.locked(file.parent):
        # Other processes may have added theirs.
        found = {problem: tile} | _choices(file) | _read(file)
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        _files.write_file(file, lambda part: part.write_text(text, "utf-8"))
    _CHOICES[file] = found
    return found[problem]
