"""Says what machine this is: ``python -m lab.cuda.first_run.machine FILE [--dry]``.

The file gets it as JSON. What the run cannot do without is a failure, each in a line.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lab.cuda.first_run import tools
from lab.cuda.first_run.steps import FAILURE

PACKAGES = ("torch", "triton", "pybind11", "numpy", "safetensors", "pytest", "bitsandbytes")
PROGRAMS = ("cmake", "ninja", "nvcc", "c++", "ncu", "compute-sanitizer")
_QUERY = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "mig.mode.current")
_RELEASE = re.compile(r"release [\d.]+|\d+\.\d+[\w.]*")
_NO_DEVICE: dict[str, Any] = {"name": "the emulator", "capability": [8, 0]}


def _said(*command: str) -> str:
    """What a program prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {type(error).__name__}"
    return (done.stdout + done.stderr).strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "there" if tools.has(package) else "absent"


def _programs() -> dict[str, str]:
    found = {}
    for name in PROGRAMS:
        path = {"nvcc": tools.nvcc, "c++": tools.compiler}.get(name, lambda n=name: tools.find(n))()
        version = _RELEASE.search(_said(path, "--version")) if path else None
        found[name] = (version[0] if version else "there") if path else "absent"
        print(f"{name}: {path}")
    return found


def _devices(faults: list[str]) -> list[dict[str, Any]]:
    """Torch's CUDA devices; ``faults`` gets why there are none."""
    try:
        import torch
    except ImportError as error:
        faults.append(f"torch: {sys.executable} cannot import it (PY names another): {error}")
        return []
    if not torch.cuda.is_available():
        faults.append(f"torch {torch.__version__} finds no CUDA device (CUDA {torch.version.cuda})")
        return []
    if torch.version.cuda is None:
        faults.append(f"torch {torch.__version__} is not for CUDA")
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": about.name,
                "capability": [about.major, about.minor],
                "memory_bytes": about.total_memory,
                "processors": about.multi_processor_count,
                "l2_bytes": about.L2_cache_size,
            }
        )
    return found


def main(file: Path, dry: bool) -> int:
    """The exit status."""
    faults: list[str] = []
    about: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "dry": dry,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "programs": _programs(),
        "devices": [_NO_DEVICE] if dry else _devices(faults),
    }
    if smi := tools.find("nvidia-smi"):
        about["driver"] = _said(smi, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader")
        print(_said(smi))
    else:
        about["driver"] = "nvidia-smi is absent"
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=1))
    for fault in faults:
        print(f"{FAILURE}{fault}")
    print(", ".join(device["name"] for device in about["devices"]) or "no device")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--dry" in sys.argv[2:]))
