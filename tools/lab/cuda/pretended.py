"""CPU tensors of which DLPack says that they are on CUDA devices.

A library that reads tensors by DLPack's exchange interface then takes its way for CUDA, as far as
its kernels, which must run on the CPU: the emulator's do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qkern.backends import _compiled

CPU, CUDA = 1, 2
"""DLPack's numbers."""


class _DlTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
    )


_Read = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_DlTensor))
_Stream = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class _Api(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 3),
        ("read", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


@dataclass
class Devices:
    """Where tensors seem to be, and the current streams."""

    device: int = 0
    """Of every tensor that ``others`` lacks."""
    others: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By a tensor's id its device's type and number."""
    streams: dict[int, int] = field(default_factory=dict)
    """By device; where there is none, DLPack answers with an error."""
    tells_streams: bool = True
    """Whether the interface has that function."""

    def place(self, tensor: Tensor, device_type: int, device: int) -> None:
        """Let one tensor be elsewhere."""
        self.others[id(tensor)] = device_type, device


@contextmanager
def pretended(library: ModuleType, devices: Devices) -> Iterator[None]:
    """Have ``library`` read CPU tensors as those of ``devices``."""
    true = getattr(torch.Tensor, "__dlpack_c_exchange_api__")  # noqa: B009 - mypy knows no such
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = _Api.from_address(get(true, b"dlpack_exchange_api"))
    read_truly = _Read(api.read)

    def read(tensor: Any, out: Any) -> int:
        answer: int = read_truly(tensor, out)
        if answer == 0:
            place = devices.others.get(id(tensor), (CUDA, devices.device))
            out.contents.device_type, out.contents.device_id = place
        return answer

    def stream(device_type: int, device: int, out: Any) -> int:
        if device not in devices.streams:
            return -1
        out[0] = devices.streams[device]
        return 0

    functions = _Read(read), _Stream(stream)
    first, second = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    ours = _Api(api.major, api.minor, None, api.others, first, second)
    if not devices.tells_streams:
        ours.stream = None
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    probes = [torch.empty(1), nn.Parameter(torch.empty(1))]
    storage = _compiled._storage_functions()
    ours_in_capsule = new(ctypes.addressof(ours), b"dlpack_exchange_api", None)
    if not library.read_tensors_with(ours_in_capsule, probes, *storage):
        raise RuntimeError("the library does not take the interface")
    try:
        yield
    finally:
        library.read_tensors_with(true, probes, *storage)
