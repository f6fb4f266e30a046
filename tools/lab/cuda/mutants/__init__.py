"""The planted bugs: each one small replacement in a copy of csrc/cuda.

What can notice one:

    numbers    a wrong result with threads in order and cp.async done at once
    poison     the same, and the result is a NaN: memory was read that nobody had written
    schedule   a result wrong only under another order of threads or with late cp.async
    launch     the emulator ends a launch: misalignment, divergent barrier, out of shared memory
    address    AddressSanitizer or UndefinedBehaviorSanitizer
    thread     ThreadSanitizer
    layout     the banks that an access to shared memory meets
    code       the machine code: spills, widths of accesses
"""

from __future__ import annotations

from .adamw import ADAMW
from .codes import CODES
from .experts import EXPERTS
from .hopper import HOPPER
from .into import INTO
from .matmuls import MATMULS

MUTANTS = (*CODES, *MATMULS, *EXPERTS, *INTO, *HOPPER, *ADAMW)
"""Those that `lab.cuda.verdicts` judges; what proofs of race-freedom notice is in `races`."""
