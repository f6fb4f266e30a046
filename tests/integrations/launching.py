"""``accelerate launch`` of a program of tests, in a number of processes on this machine's CPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from lab.processes import environment

FSDP2: dict[str, Any] = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
    },
}
DDP: dict[str, Any] = {"distributed_type": "MULTI_GPU"}
"""On CPUs too: with ``MULTI_CPU`` the launcher starts one process only, and wants MPI for more."""
ALONE: dict[str, Any] = {"distributed_type": "NO"}


def cli(*args: str) -> None:
    """Run ``accelerate ARGS``; fails with its output where it fails."""
    variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *args],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def launch(config: dict[str, Any], processes: int, program: str, *args: str, folder: Path) -> None:
    """Run ``python -m PROGRAM ARGS`` in processes, by a configuration kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    common = {
        "compute_environment": "LOCAL_MACHINE",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": processes,
        "use_cpu": True,
    }
    file.write_text(yaml.safe_dump(common | config))
    places = ("--config_file", str(file), "--main_process_port", "0")
    cli("launch", *places, "-m", program, *args)


def run(
    config: dict[str, Any], processes: int, folder: Path, *scenarios: str, at: Path
) -> list[dict[str, Any]]:
    """What each rank found in scenarios of ``launched``, whose files are in ``at``.

    The models must be there (``launched.save_dense``), and for a scenario of what is resumed the
    state that one of its kind saved.
    """
    program = "tests.integrations.launched"
    launch(config, processes, program, str(at), str(folder), *scenarios, folder=folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
