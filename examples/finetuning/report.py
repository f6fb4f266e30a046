"""What a run reports: sizes, memory, versions, the loss curve and run.json."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from matplotlib.figure import Figure

import qkern.backends
import qkern.env

from .output import WRITER, atomic_file, write_atomic

if TYPE_CHECKING:
    from .training import History


def current_memory(device: torch.device) -> int:
    """Bytes in use now: allocated on the GPU, resident for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: allocated on the GPU, resident for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        # What getrusage tells on Linux starts at what the process that started this one had.
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and kernels, so that a run can be repeated."""
    return {
        **qkern.env.report(),
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backend": qkern.backends.selected_name(device.type),
        "cpu_count": os.cpu_count(),
    }


def held(by_kind: dict[str, int]) -> str:
    """Bytes in all and by kind: ``30 (10 in 4 bits, 20 in float32)``."""
    parts = [
        f"{count:,} {'of' if kind == 'LoRA' else 'in'} {kind}" for kind, count in by_kind.items()
    ]
    return f"{sum(by_kind.values()):,} ({', '.join(parts)})"


def write_json(path: Path, content: dict[str, Any], work: Path | None = None) -> None:
    """Write `content` and who wrote it, so that a later run knows that it may replace the file."""
    text = json.dumps({"written_by": WRITER, **content}, indent=2) + "\n"
    write_atomic(path, text, work)


def plot_losses(path: Path, history: History, title: str, work: Path | None = None) -> None:
    """The training loss of every step, its running mean, and the held-out loss, as a PNG."""
    steps = [record.step for record in history.steps]
    losses = [record.loss for record in history.steps]
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else smooth[-1] + 0.1 * (loss - smooth[-1]))
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # without pyplot: no display is needed
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, smooth, color="tab:blue", label="training, running mean")
    axes.plot(
        [record.step for record in history.held_out],
        [record.loss for record in history.held_out],
        "o-",
        color="tab:orange",
        label="held out",
    )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.set_title(title, parse_math=False)  # a path may hold dollars
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path, work) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": WRITER})
