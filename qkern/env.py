"""What is installed, built and selected: ``python -m qkern.env [--json]``.

Paste the output into a bug report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import qkern
from qkern import backends

_VARIABLES = re.compile(r"(QKERN|OMP|GOMP|KMP|MKL)_|(CUDA_VISIBLE_DEVICES|ATEN_CPU_CAPABILITY)$")
_OPENMP_LIBRARY = re.compile(r"/lib[gi]?omp\d*(?:-[0-9a-f]+)?\.(?:so|dylib)[.0-9]*$")


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _openmp_runtimes() -> list[str] | None:
    """The OpenMP libraries in this process; None where the system does not tell.

    More than one means more than one thread pool.
    """
    try:
        lines = Path("/proc/self/maps").read_text("utf-8").splitlines()
    except OSError:
        return None
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if _OPENMP_LIBRARY.search(path))


def _native() -> dict[str, Any]:
    reason = backends.cpu.missing_reason()
    if reason is not None:
        return {"built": False, "reason": reason}
    report: dict[str, Any] = {
        "built": True,
        "build": backends.cpu.library().build_info(),
        "instruction_sets": backends.cpu.available_isas(),
    }
    try:
        report["instruction_set"] = backends.cpu.isa()
        report["bfloat16_rate"] = backends.cpu.library().bfloat16_rate()
    except (RuntimeError, ValueError) as error:
        report["error"] = str(error)
    return report


def _device(device_type: str) -> dict[str, Any]:
    try:
        selected: dict[str, Any] = {"selected": backends.selected_name(device_type)}
    except (RuntimeError, ValueError) as error:
        selected = {"selected": None, "error": str(error)}
    return {**selected, "backends": backends.available(device_type)}


def report() -> dict[str, Any]:
    """Everything the command prints, as plain values that ``json`` can write."""
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "qkern": qkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cuda_devices": cuda,
        "threads": torch.get_num_threads(),
        "openmp_runtimes": _openmp_runtimes(),
        "native": _native(),
        "devices": {device_type: _device(device_type) for device_type in ("cpu", "cuda")},
        "environment": {k: v for k, v in sorted(os.environ.items()) if _VARIABLES.match(k)},
    }


def _lines(found: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, object]] = [
        (name, found[name]) for name in ("qkern", "torch", "python", "platform", "processor")
    ]
    rows.append(("CUDA devices", ", ".join(found["cuda_devices"]) or "none"))
    rows.append(("threads", found["threads"]))
    runtimes = found["openmp_runtimes"]
    rows.append(("OpenMP", "unknown" if runtimes is None else ", ".join(runtimes) or "none loaded"))
    if runtimes and len(runtimes) > 1:
        rows.append(("", "more than one OpenMP runtime is loaded: threads may compete"))

    kernels = found["native"]
    rows.append(("native kernels", "built" if kernels["built"] else kernels["reason"]))
    if kernels["built"]:
        selected = kernels.get("instruction_set") or kernels["error"]
        available = ", ".join(kernels["instruction_sets"])
        rows.append(("instruction set", f"{selected} (available: {available})"))
        if rate := kernels.get("bfloat16_rate"):
            used = "used" if selected == "avx512bf16" else "not used"
            rows.append(("bfloat16 dot products", f"{rate:.1f}x float32's rate: {used}"))
        rows += [(f"build: {name}", value) for name, value in kernels["build"].items()]

    for device_type, device in found["devices"].items():
        rows.append((f"{device_type} tensors", device["selected"] or device["error"]))
        for name, reason in device["backends"].items():
            rows.append((f"  {name}", "available" if reason is None else f"missing: {reason}"))

    rows += [(name, value) for name, value in found["environment"].items()]
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:{width}}{value}" for name, value in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qkern.env", description="Tell what qkern has built and selected."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    found = report()
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
