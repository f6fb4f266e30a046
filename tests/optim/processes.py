"""Several processes that run one scenario of a program together, over gloo.

A program is a module of scenarios that ends in ``main(SCENARIOS)``; `run_processes` starts it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from lab.processes import environment

Scenario = Callable[[int, Path, str], dict[str, Any]]
"""From the rank, the folder and the pager to what was found."""


def run_processes(
    program: ModuleType, scenario: str, pager: str, folder: Path, world: int = 2
) -> list[dict[str, Any]]:
    """What each rank's scenario returns; fails with the errors of the first rank that does."""
    command = [sys.executable, "-m", program.__name__, scenario, pager]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)],
            env=environment(OMP_WAIT_POLICY="passive"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=1200)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{scenario}-{rank}.pt") for rank in range(world)]


def main(scenarios: Mapping[str, Scenario]) -> None:
    """Be one of the processes: ``python -m PROGRAM SCENARIO PAGER RANK WORLD FOLDER``."""
    scenario, pager, folder = sys.argv[1], sys.argv[2], Path(sys.argv[5])
    rank, world = int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"{scenario}-{world}-store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(scenarios[scenario](rank, folder, pager), folder / f"{scenario}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
