"""Probes of the processor's peaks as a few bytes of machine code, so that no compiler is needed.

x86-64 under the System V calling convention only; elsewhere every probe gives None, and the limits
come from torch alone. Encodings: Intel's Software Developer's Manual, volume 2.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence

_ACCUMULATORS = 12  # more than latency (4 cycles) times two FMA ports
_RET = b"\xc3"
_VZEROUPPER = b"\xc5\xf8\x77"
_LINES = 8  # cache lines that one turn of the read loop takes
_LINE = 64

_TILE_ACCUMULATORS = 6  # tiles 6 and 7 are the sources
_TILE_FLOPS = 2 * 16 * 16 * 32  # of one TDPBF16PS: 16 x 16 sums of 32 products
_TILE_RELEASE = b"\xc4\xe2\x78\x49\xc0"
_TILE_CONFIG_BYTES = 64
_STTILECFG_RDI, _LDTILECFG_RDI = b"\xc4\xe2\x79\x49\x07", b"\xc4\xe2\x78\x49\x07"
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILEDATA = 158, 0x1023, 18


def fma_gflops(isa: str, threads: int, seconds: float = 0.1) -> float | None:
    """Peak float32 GFLOP/s of `threads` threads: independent multiply-adds, no memory at all."""
    if isa not in ("avx2", "avx512") or not _runs_here():
        return None
    wide = isa == "avx512"
    zero = b"".join(_vxorps(i) for i in range(_ACCUMULATORS + 2))
    sources = (_ACCUMULATORS, _ACCUMULATORS + 1)
    body = b"".join(_vfmadd231ps(i, *sources, wide) for i in range(_ACCUMULATORS)) * 4
    code = _function(zero + _loop(body, counter=_DEC_RDI) + _VZEROUPPER + _RET, 1)
    if code is None:
        return None
    flops_per_turn = 4 * _ACCUMULATORS * 2 * (16 if wide else 8)
    return _rate([code] * threads, flops_per_turn, seconds)


def amx_gflops(threads: int, seconds: float = 0.1) -> float | None:
    """Peak bfloat16 GFLOP/s of the tile unit; ask only where the processor has ``amx_bf16``."""
    if not _runs_here() or sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILEDATA):
        return None  # the kernel does not let this process use tiles
    config = struct.pack("<BB14x8H16x8B8x", 1, 0, *[64] * 8, *[16] * 8)
    config_at = ctypes.create_string_buffer(config, 64)
    load = b"\xc4\xe2\x78\x49\x06"  # ldtilecfg [rsi]
    zero = b"".join(b"\xc4\xe2\x7b\x49" + _modrm(i, 0) for i in range(8))
    body = b"".join(_tdpbf16ps(i, 6, 7) for i in range(_TILE_ACCUMULATORS)) * 2
    code = _function(load + zero + _loop(body, counter=_DEC_RDI) + _TILE_RELEASE + _RET, 2)
    if code is None:
        return None

    def run(turns: int) -> None:
        code(turns, ctypes.addressof(config_at))

    return _rate([run] * threads, 2 * _TILE_ACCUMULATORS * _TILE_FLOPS, seconds)


def read_gbytes(address: int, size: int, isa: str, threads: int, rounds: int = 5) -> float | None:
    """The best GB/s of `threads` threads, each loading its part of ``size`` bytes at `address`."""
    if isa not in ("avx2", "avx512") or not _runs_here():
        return None
    loads = b"".join(_vmovups_from_rdi(i, isa == "avx512") for i in range(_LINES))
    if isa == "avx2":  # 32 bytes each, so a second half
        loads += b"".join(_vmovups_from_rdi(i + _LINES, False) for i in range(_LINES))
    advance = b"\x48\x81\xc7" + struct.pack("<i", _LINES * _LINE)  # add rdi, bytes
    code = _function(_loop(loads + advance, counter=_DEC_RSI) + _VZEROUPPER + _RET, 2)
    if code is None:
        return None
    turns = size // threads // (_LINES * _LINE)
    part = turns * _LINES * _LINE
    jobs = [functools.partial(code, address + i * part, turns) for i in range(threads)]
    return max(threads * part / _together(jobs) / 1e9 for _ in range(rounds))


class TileState:
    """The tile unit's configuration of the calling thread, for OpenMP's threads to take again.

    A library that configures the unit but once a thread needs it after another has released it.
    """

    def __init__(self) -> None:
        store, load = (_function(code + _RET, 1) for code in (_STTILECFG_RDI, _LDTILECFG_RDI))
        if store is None or load is None or not _runs_here():
            raise OSError("this system runs no machine code made here")
        self._config = ctypes.create_string_buffer(_TILE_CONFIG_BYTES)
        store(ctypes.addressof(self._config))
        self._load = load
        self._parallel = ctypes.CDLL(None).GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]

    def restore(self, threads: int) -> None:
        """Configure the tile units of a team of `threads`, of which the caller is one."""
        address = self._load.__dict__["address"]
        self._parallel(address, ctypes.addressof(self._config), threads, 0)


def _runs_here() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and sys.platform != "win32"


def _rate(jobs: Sequence[Callable[[int], None]], work_per_turn: int, seconds: float) -> float:
    """The best of five: work a nanosecond of all jobs together, each about `seconds` long."""
    turns = 1000
    while (elapsed := _together([functools.partial(job, turns) for job in jobs])) < seconds / 4:
        turns *= 4
    turns = max(1, int(turns * seconds / elapsed))
    best = min(_together([functools.partial(job, turns) for job in jobs]) for _ in range(5))
    return len(jobs) * turns * work_per_turn / best / 1e9


def _together(jobs: Sequence[Callable[[], object]]) -> float:
    """Seconds from the first job's start to the last one's end, each in a thread of its own."""
    barrier = threading.Barrier(len(jobs))
    times: list[tuple[float, float]] = []

    def run(job: Callable[[], object]) -> None:
        barrier.wait()
        start = time.perf_counter()
        job()  # ctypes lets go of the interpreter's lock
        times.append((start, time.perf_counter()))

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in times) - min(start for start, _ in times)


def _function(code: bytes, arguments: int) -> Callable[..., None] | None:
    """A callable for position-independent `code` taking `arguments` machine words."""
    try:
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        memory = mmap.mmap(-1, mmap.PAGESIZE, prot=protection)
    except OSError:
        return None  # a hardened system allows no memory that is writable and executable
    memory.write(code)
    anchor = ctypes.c_char.from_buffer(memory)
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_size_t] * arguments)(ctypes.addressof(anchor))

    def function(*values: int) -> None:
        call(*values)

    function.__dict__["memory"] = anchor  # lives as long as the callable
    function.__dict__["address"] = ctypes.addressof(anchor)
    return function


_DEC_RDI, _DEC_RSI = b"\x48\xff\xcf", b"\x48\xff\xce"


def _loop(body: bytes, counter: bytes) -> bytes:
    body += counter
    return body + b"\x0f\x85" + struct.pack("<i", -len(body) - 6)  # jnz


def _modrm(reg: int, rm: int) -> bytes:
    return bytes([0xC0 | (reg & 7) << 3 | rm & 7])


def _vex(reg: int, rm: int, vvvv: int, opcode_map: int, w_l_pp: int) -> bytes:
    inverted = (reg < 8) << 7 | 1 << 6 | (rm < 8) << 5
    return bytes([0xC4, inverted | opcode_map, (~vvvv & 15) << 3 | w_l_pp])


def _vxorps(i: int) -> bytes:
    """``vxorps xmm_i, xmm_i, xmm_i``, which clears the whole register."""
    return _vex(i, i, i, 1, 0b000) + b"\x57" + _modrm(i, i)


def _vfmadd231ps(d: int, a: int, b: int, wide: bool) -> bytes:
    """``d += a * b`` on registers 0 to 15, of 512 bits or 256."""
    if not wide:
        return _vex(d, b, a, 2, 0b101) + b"\xb8" + _modrm(d, b)
    inverted = (d < 8) << 7 | 1 << 6 | (b < 8) << 5 | 1 << 4
    prefix = bytes([0x62, inverted | 0b010, (~a & 15) << 3 | 0b101, 0b01001000])
    return prefix + b"\xb8" + _modrm(d, b)


def _vmovups_from_rdi(i: int, wide: bool) -> bytes:
    """Load vector ``i`` after rdi into register ``i``."""
    rdi = 0x07 | (i & 7) << 3
    if wide:  # an 8-bit displacement counts vectors
        return bytes([0x62, (i < 8) << 7 | 0x71, 0x7C, 0x48, 0x10, 0x40 | rdi, i])
    return _vex(i, 0, 0, 1, 0b100) + bytes([0x10, 0x80 | rdi]) + struct.pack("<i", 32 * i)


def _tdpbf16ps(d: int, a: int, b: int) -> bytes:
    return _vex(d, a, b, 2, 0b010) + b"\x5c" + _modrm(d, a)
