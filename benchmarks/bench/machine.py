"""The machine: what it is, and the bandwidth and arithmetic it reaches in this run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qkern.env

from . import machinecode, memory

_FLAGS = re.compile(r"avx2|fma|f16c|avx512\w*|avx_vnni|amx_\w+|asimd\w*|sve\w*|bf16|i8mm")
_PACKAGES = ("torch", "numpy", "bitsandbytes", "peft", "transformers", "accelerate", "torchao")
_DEFAULT_CACHE = 32 << 20
_MIN_BUFFER = 256 << 20
_MATMUL_SIZE = 1536


@dataclass(frozen=True)
class Limits:
    """Peaks measured in this run; GB/s are 10^9 bytes a second, None is not measured.

    ``read_gb_s``
        the fastest of several ways to read a buffer of more than twice the last-level cache.
    ``copy_gb_s``
        ``Tensor.copy_`` on such buffers, bytes read plus bytes written.
    ``fma_gflops``, ``amx_gflops``
        independent multiply-adds in registers (float32) or tiles (bfloat16), by machine code.
    ``matmul_gflops``
        what ``torch.mm`` reaches, by dtype.
    """

    read_gb_s: float
    copy_gb_s: float
    fma_gflops: float | None
    amx_gflops: float | None
    matmul_gflops: dict[str, float]

    def peak_gflops(self, dtype: torch.dtype) -> float:
        """The arithmetic limit of `dtype`: the highest rate that anything here has reached."""
        name = _name(dtype)
        found = [self.fma_gflops or 0.0, self.matmul_gflops.get(name, 0.0)]
        found.append(self.matmul_gflops.get("float32", 0.0))
        if dtype == torch.bfloat16:
            found.append(self.amx_gflops or 0.0)
        return max(found)

    def seconds(self, bytes: int, flops: int, dtype: torch.dtype) -> tuple[float, str]:
        """The least time for so much work, and which limit sets it; 0 where neither does."""
        memory = bytes / self.read_gb_s / 1e9
        compute = flops / self.peak_gflops(dtype) / 1e9
        return (memory, "memory") if memory >= compute else (compute, "compute")

    def better_of(self, other: Limits) -> Limits:
        """The higher of two measurements: a limit is what the machine can do undisturbed."""
        matmul = {k: max(v, other.matmul_gflops.get(k, 0)) for k, v in self.matmul_gflops.items()}
        return Limits(
            read_gb_s=max(self.read_gb_s, other.read_gb_s),
            copy_gb_s=max(self.copy_gb_s, other.copy_gb_s),
            fma_gflops=_higher(self.fma_gflops, other.fma_gflops),
            amx_gflops=_higher(self.amx_gflops, other.amx_gflops),
            matmul_gflops=matmul,
        )


def _higher(a: float | None, b: float | None) -> float | None:
    return a if b is None else b if a is None else max(a, b)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cache_bytes() -> int:
    """The last-level cache as the system tells it, which in a virtual machine others share."""
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if re.fullmatch(r"\d+[KM]", text := path.read_text().strip())
    ]
    return max(sizes, default=_DEFAULT_CACHE)


def measure(dtypes: list[torch.dtype], threads: int, isa: str, buffer_bytes: int) -> Limits:
    """Measure every limit; takes a few seconds.

    `isa` caps the vector width of the machine code, and ``"amx"`` adds the tile unit.
    """
    vector = "avx512" if isa == "amx" else isa
    source = torch.ones(buffer_bytes // 4)
    reads: list[Callable[[], object]] = [source.sum, lambda: torch.dot(*source.chunk(2))]
    read = max(source.nbytes / _best(way) / 1e9 for way in reads)
    by_loads = machinecode.read_gbytes(source.data_ptr(), source.nbytes, vector, threads)
    half = source.numel() // 2
    copied = _best(lambda: source[:half].copy_(source[half : 2 * half]))
    return Limits(
        read_gb_s=max(read, by_loads or 0.0),
        copy_gb_s=2 * 4 * half / copied / 1e9,
        fma_gflops=machinecode.fma_gflops(vector, threads),
        amx_gflops=machinecode.amx_gflops(threads) if isa == "amx" else None,
        matmul_gflops={_name(d): _matmul(d) for d in {torch.float32, *dtypes}},
    )


def probe_buffer_bytes(cache: int) -> int:
    """More than twice the cache, if a quarter of the free memory allows."""
    affordable = memory.available() // 4
    return max(_MIN_BUFFER // 8, min(max(_MIN_BUFFER, 3 * cache), affordable)) // 4096 * 4096


def _matmul(dtype: torch.dtype) -> float:
    n = _MATMUL_SIZE
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out)) / 1e9


def _best(call: Callable[[], object], rounds: int = 6) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(once() for _ in range(rounds))


def describe(threads: int) -> dict[str, Any]:
    """Device, processor flags, versions, threads, load: what a result must be read with."""
    report = qkern.env.report()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processor": report["processor"],
        "cores": os.cpu_count(),
        "cpu_flags": cpu_flags(),
        "last_level_cache_bytes": cache_bytes(),
        "memory_bytes": memory.total(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"qkern": qkern.__version__} | _versions(),
        "commit": _commit(),
        "threads": threads,
        "qkern_isa": report["native"].get("instruction_set"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "environment": {
            **report["environment"],
            **{k: v for k, v in os.environ.items() if k.startswith("ONEDNN_")},
        },
        "load_average": list(os.getloadavg()),
    }


def cpu_flags() -> list[str]:
    """The vector extensions that the processor names."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return sorted(flag for flag in (found[1].split() if found else ()) if _FLAGS.fullmatch(flag))


def _versions() -> dict[str, str]:
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return {package: installed[package] for package in _PACKAGES if package in installed}


def _commit() -> str | None:
    """The checked-out commit, with a + where files have changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def widest_isa(cap: str | None = None) -> str:
    """The processor's widest instruction set that the probes know, up to `cap`."""
    flags = set(cpu_flags())
    order = ["scalar", "avx2", "avx512", "amx"]
    needs = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f"}, "amx": {"amx_bf16", "avx512f"}}
    # They look for the peaks of float32 and of tiles, to which VNNI and AVX512-BF16 add nothing.
    cap = "avx512" if cap in ("avx512vnni", "avx512bf16") else cap
    last = order.index(cap) if cap else len(order) - 1
    return max((n for n in order[: last + 1] if needs.get(n, set()) <= flags), key=order.index)
