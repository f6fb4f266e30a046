"""Prints what ``python -m qkern.env`` does, and fails unless CUDA tensors take qkern's kernels.

``python -m lab.cuda.first_run.environment [--dry]``
"""

from __future__ import annotations

import sys

import torch

from lab.cuda.first_run import device
from lab.cuda.first_run.steps import FAILURE
from qkern import backends, env


def main(dry: bool) -> int:
    """The exit status."""
    env.main([])
    try:
        found = device.get(dry)
    except (ImportError, RuntimeError) as error:
        print(f"{FAILURE}{error}")
        return 1
    name = str(found.target)
    if not dry and (name := backends.select(torch.device("cuda", 0)).name) != "cuda":
        print(f"{FAILURE}CUDA tensors take {name}")
        return 1
    print(f"takes {name}, {device.limits(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main("--dry" in sys.argv[1:]))
