"""Asks sentryward whether the PTX of a Triton kernel is free of races for one launch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from lab.ptx_prover import verify
from lab.triton.static.compile import Compiled


def prove(
    compiled: Compiled, folder: Path, programs: int = 2, seconds: int = 120
) -> dict[str, Any]:
    """Sentryward's answer for the first `programs` of a launch, in its own words."""
    ptx = compiled.asm["ptx"]
    header = re.search(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
    assert header is not None
    # What is not in the code is a parameter, and Triton adds two pointers of its own.
    given = [
        value
        for name, value in compiled.arguments.items()
        if name not in compiled.constants
        and value is not None
        and (isinstance(value, torch.Tensor) or value != 1)
    ]
    pointers, numbers = [], []
    for index, line in enumerate(header[2].strip().splitlines()):
        kind = re.search(r"\.param \.(\w+)", line)
        assert kind is not None
        if ".ptr" in line:
            assert index >= len(given) or isinstance(given[index], torch.Tensor), line
            declared = {"type": "pointer", "space": "global", "object": f"tensor{index}"}
            pointers.append({"parameter": index, **declared})
        else:
            numbers.append({"parameter": index, "type": kind[1], "value": given[index]})
    question = {
        "schema": "spverify.kernel-input/v1",
        "entry": header[1],
        "launch": {
            "grid_dim": [min(compiled.grid[0], programs), 1, 1],
            "block_dim": [32 * compiled.num_warps, 1, 1],
        },
        "declarations": pointers,
        "arguments": numbers,
    }
    (folder / "kernel.ptx").write_text(ptx)
    (folder / "input.json").write_text(json.dumps(question))
    return verify(folder / "kernel.ptx", folder / "input.json", seconds, memory_limit_mib=4000)
