"""Neither matmul ever holds the dequantised weight: scratch is at most 1 MiB a thread."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkern import backends, testing
from qkern.testing import OPS, Case

MIB = 1 << 20

needs_native = pytest.mark.skipif(
    backends.available("cpu")["cpu"] is not None, reason="qkern._C is not built"
)

# (M, N, K): each of them large in turn; the largest weight is 64 MiB in float32.
LARGE = ((1, 4096, 4096), (512, 64, 16_384), (512, 16_384, 64), (4096, 128, 512), (33, 1, 65_536))
SIZES = [*((shape, 64) for shape in LARGE), ((8, 16, 32_768), 16_384), ((70, 16, 32_768), 16_384)]


@pytest.mark.parametrize(
    ("shape", "block_size"), SIZES, ids=[f"{'x'.join(map(str, s))}-{b}" for s, b in SIZES]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.DTYPE_NAMES.get)
@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("linear_4bit")])
def test_scratch_of_the_matmuls(
    isa: str, op: str, dtype: torch.dtype, shape: tuple[int, ...], block_size: int
) -> None:
    from qkern import _C

    case = Case(shape, dtype, block_size, double_quant=True, rank=64)
    inputs = OPS[op].make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    for batch_invariant in (False, True):
        _C.scratch_bytes(True)
        OPS[op].run(inputs | {"batch_invariant": batch_invariant})
        assert _C.scratch_bytes(False) <= MIB


@pytest.mark.parametrize("op", [name for name, spec in OPS.items() if spec.comparison == "bitwise"])
def test_scratch_of_the_other_ops(isa: str, op: str) -> None:
    from qkern import _C

    case = Case((4096 * 512,), torch.bfloat16, block_size=4096)
    inputs = OPS[op].make_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    _C.scratch_bytes(True)
    OPS[op].run(inputs)
    assert _C.scratch_bytes(False) <= MIB


PROGRAM = """
import json, sys
from pathlib import Path
import torch
import qkern
from qkern import formats

N, K, M = 4096, 8192, 64
torch.set_num_threads(2)

def status(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1]) * 1024

def growth(work):
    work(small, torch.randn(M, 256, dtype=dtype, requires_grad=True))
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    work(large, x)
    return status("VmHWM") - before

def weight(n, k):
    blocks = formats.num_blocks(n * k, 64)
    return qkern.QuantizedTensor(
        torch.randint(256, (n * k // 2,), dtype=torch.uint8),
        torch.randint(256, (blocks,), dtype=torch.uint8),
        torch.rand(formats.num_blocks(blocks, 256)), torch.tensor(0.1),
        None, "nf4", 64, (n, k), dtype)

def fused(qw, x):
    qkern.linear_4bit(x, qw).sum().backward()

def dense(qw, x):
    torch.nn.functional.linear(x, qw.dequantize(dtype)).sum().backward()

dtype = getattr(torch, sys.argv[1])
small, large = weight(128, 256), weight(N, K)
fused_growth = growth(fused)
print(json.dumps({"fused": fused_growth, "dense": growth(dense)}))
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_process_memory_of_forward_and_backward(dtype: str) -> None:
    """A training step's peak grows by its activations only; a dense one's by the weight too."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout)
    dense_weight = 4096 * 8192 * getattr(torch, dtype).itemsize
    assert growth["dense"] > dense_weight, "the measure itself does not see a dense weight"
    activations = 64 * (8192 + 2 * 4096) * getattr(torch, dtype).itemsize
    assert growth["fused"] < activations + 2 * MIB + 4 * MIB
    assert growth["fused"] < dense_weight / 4
