"""State that is far larger than the budget."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.processes import environment

LARGE = """
import resource
from pathlib import Path
import torch
from qkern.optim import PagedAdamW
torch.set_num_threads(2)
N, COUNT = 1 << 24, 16  # 2 GiB of moments
params = [torch.nn.Parameter(torch.zeros(N, dtype=torch.bfloat16)) for _ in range(COUNT)]
grad = torch.empty(N, dtype=torch.bfloat16)
options = {{"path": {path!r}, "budget_bytes": 256 << 20}} if {path!r} else {{}}
optimizer = PagedAdamW(params, lr=1e-2, **options)
def rss(key):
    found = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)]
    return int(found[0].split()[1]) << 10
for step in range(2):
    generator = torch.Generator().manual_seed(step)
    grad.normal_(generator=generator)
    for param in params:
        param.grad = grad
    if step == 0:
        before = rss("VmRSS")
    optimizer.step()
print(rss("VmHWM") - before)
import hashlib
digest = hashlib.sha256()
for param in params:
    digest.update(param.detach().view(torch.int16).numpy())
print(digest.hexdigest())
state = optimizer.state_dict()["state"]
for index in range(COUNT):
    for key in ("exp_avg", "exp_avg_sq"):
        digest.update(state[index][key].numpy())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_2_gib_of_state_in_256_mib(tmp_path: Path) -> None:
    """All parameters are 0.5 GiB of bfloat16 and share one gradient; only the state is large."""
    results = []
    path = tmp_path / "state"
    try:
        for name in (str(path), ""):
            program = LARGE.format(path=name)
            found = subprocess.run(
                [sys.executable, "-c", program],
                capture_output=True,
                text=True,
                timeout=3000,
                env=environment(),
            )
            assert found.returncode == 0, found.stderr
            results.append(found.stdout.split())
    finally:
        path.unlink(missing_ok=True)
    (grown, *paged), (grown_in_memory, *in_memory) = results
    assert paged == in_memory
    # Beside the budget: threads' stacks, the allocator, pages of parameters touched at first.
    assert int(grown) <= (256 << 20) + (64 << 20)
    assert int(grown_in_memory) >= 2 << 30
