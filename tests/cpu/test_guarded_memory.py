"""No kernel touches a byte outside its tensors: each lies against an unmapped page."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from lab.processes import environment


@pytest.mark.parametrize("side", ["after", "before"])
def test_no_access_outside_the_tensors(isa: str, side: str) -> None:
    command = [sys.executable, "-m", "lab.guarded_memory", isa, side]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment()
    )
    last = (done.stdout.splitlines() or ["(before the first case)"])[-1]
    assert done.returncode == 0, f"{isa}: {last}: status {done.returncode}\n{done.stderr}"


@pytest.mark.parametrize("side", ["after", "before"])
def test_the_guard_page_stops_an_access_one_byte_too_far(side: str) -> None:
    program = f"""
import ctypes
import torch
from lab.guarded_memory import GuardedTorch
t = GuardedTorch({side!r}).copy(torch.arange(7, dtype=torch.uint8))
print(ctypes.string_at(t.data_ptr(), 7).hex(), flush=True)
ctypes.string_at(t.data_ptr() + (7 if {side!r} == "after" else -1), 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, env=environment()
    )
    assert done.stdout.strip() == b"00010203040506", done.stderr
    assert done.returncode == -signal.SIGSEGV
