"""Runs part of the op table on a CUDA device, in one process; made for compute-sanitizer.

``python -m lab.cuda.run_on_gpu [STRIDE [LARGEST]]``: every STRIDE-th case of at most LARGEST
multiply-adds or elements. Prints the case at work, so that the last line names the one at which a
tool ended the process; at the end, their number. Results are checked too.
"""

from __future__ import annotations

import sys

import torch

from lab.cuda.emulator.run_table import cases
from qkern import testing

STRIDE = 7
LARGEST = 400_000


def main(stride: int = STRIDE, largest: int = LARGEST, device: str = "cuda") -> int:
    """Number of cases, which were all right."""
    target = next(t for t in testing.targets(device) if t.backend == device)
    if target.reason is not None:
        raise RuntimeError(f"{target}: {target.reason}")
    count = 0
    for spec, case in cases(stride, largest):
        print(spec.id(case, target), flush=True)
        testing.check(spec, case, target, device)
        count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases")
    return count


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("lab.cuda.run_on_gpu: torch finds no CUDA device")
    main(*(int(argument) for argument in sys.argv[1:]))
