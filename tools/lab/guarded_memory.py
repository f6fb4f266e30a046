"""Run the op table natively with every tensor against an unmapped page.

A kernel that reads or writes one byte beyond a tensor dies by a signal, which is why
``test_guarded_memory.py`` runs this as a program: ``lab.guarded_memory ISA after|before``. The last
line it prints is the case at work.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from qkern import backends, ops, testing
from qkern.backends import _backend

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0  # sys/mman.h; the module mmap has no name for it
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class GuardedTorch:
    """Stands for the module ``torch`` in the backends, and allocates beside a guard page."""

    def __init__(self, side: str) -> None:
        self.side = side

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(
        self, size: int | Sequence[int], *, dtype: torch.dtype, device: object = None
    ) -> Tensor:
        """Like ``torch.empty``, filled with the byte 0xFF (a NaN in every dtype)."""
        shape = (size,) if isinstance(size, int) else tuple(size)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        length = -(-nbytes // _PAGE) * _PAGE
        memory = mmap.mmap(-1, length + _PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        guard, start = (length, length - nbytes) if self.side == "after" else (0, _PAGE)
        memory[start : start + nbytes] = b"\xff" * nbytes
        if _mprotect(address + guard, _PAGE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
        flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start)
        return flat.view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def run_guarded(spec: testing.OpSpec, case: testing.Case, guarded: GuardedTorch) -> None:
    """Run `case` twice, unguarded and guarded; both give the same bits."""
    inputs = spec.make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    expected = spec.run(inputs)
    inputs = {n: testing.map_tensors(value, guarded.copy) for n, value in inputs.items()}
    _backend.torch = guarded  # type: ignore[attr-defined]
    actual = spec.run(inputs, in_place=True)
    _backend.torch = torch  # type: ignore[attr-defined]
    for a, e in zip(actual, expected, strict=True):
        testing.assert_bitwise(a, e)


def main(isa: str, side: str) -> None:
    # These would allocate results elsewhere.
    for op in backends.cpu.fast.keys() & {name for name in ops.OPS if name.startswith("linear_")}:
        backends.cpu.fast.pop(op, None)
    count = 0
    with testing.Target("cpu", isa).activate():
        for name, spec in testing.OPS.items():
            for case in spec.cases:
                if case.layout == "contiguous" and case.values == "normal":
                    print(name, case, flush=True)
                    run_guarded(spec, case, GuardedTorch(side))
                    count += 1
    print(f"{count} cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
