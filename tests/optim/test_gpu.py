"""PagedAdamW on a real GPU: numbers, CUDA graphs, no waiting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkern.optim import PagedAdamW, _driver

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPES = ((), (3,), (17, 5), (64, 96), (50_000,), (130, 257))
BUDGET = 256 << 10
STEPS = 5


def make_params(device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]


def set_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """In place, as a captured graph needs it."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * scale
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(grad)


def trained(device: str, **options: Any) -> list[Tensor]:
    params = make_params(device)
    optimizer = PagedAdamW(params, **options)
    for step in range(STEPS):
        set_grads(params, step)
        optimizer.step()
    return [param.detach().cpu() for param in params]


@pytest.fixture(params=["managed", "pinned"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    reason = _driver.current.why_not_managed(torch.device("cuda", 0))
    if request.param == "managed" and reason:
        pytest.skip(reason)
    if request.param == "pinned":
        monkeypatch.setattr(_driver.CudaDriver, "why_not_managed", lambda self, device: "a test")
    return str(request.param)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_gpu_gives_the_bits_of_a_cpu(bits: int) -> None:
    found = trained("cuda", pager="none", bits=bits)
    assert all(map(torch.equal, found, trained("cpu", pager="none", bits=bits)))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("budget", [64 << 10, BUDGET, None])
def test_paged_on_a_gpu(memory: str, bits: int, budget: int | None) -> None:
    options: dict[str, Any] = {"bits": bits, "budget_bytes": budget}
    found = trained("cuda", pager="unified", **options)
    assert all(map(torch.equal, found, trained("cpu", pager="none", bits=bits)))


def test_checkpoint_of_a_paged_optimizer(memory: str) -> None:
    wanted = trained("cpu", pager="none")
    params = make_params("cuda")
    state: dict[str, Any] = {}
    for first in range(STEPS):
        optimizer = PagedAdamW(params, budget_bytes=BUDGET)
        assert memory in optimizer.paging["cuda:0"]
        if first:
            optimizer.load_state_dict(state)
        set_grads(params, first)
        optimizer.step()
        state = optimizer.state_dict()
        assert all(value["exp_avg"].is_cpu for value in state["state"].values())
    assert all(torch.equal(p.detach().cpu(), w) for p, w in zip(params, wanted, strict=True))


@pytest.mark.parametrize("bits", [32, 8])
def test_captured_in_a_graph(bits: int) -> None:
    params = make_params("cuda")
    optimizer = PagedAdamW(params, pager="none", bits=bits, max_grad_norm=1.0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        set_grads(params, 0)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, STEPS):
        set_grads(params, step)
        graph.replay()
    wanted = make_params("cuda")
    other = PagedAdamW(wanted, pager="none", bits=bits, max_grad_norm=1.0)
    for step in range(STEPS):
        set_grads(wanted, step)
        other.step()
    assert all(map(torch.equal, params, wanted))
    assert all(float(optimizer.state[param]["step"]) == STEPS for param in params)


@pytest.mark.parametrize("pager", ["none", "unified"])
def test_no_step_waits_for_the_gpu(pager: str) -> None:
    params = make_params("cuda")
    optimizer = PagedAdamW(params, pager=pager, max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    optimizer.grad_scale = torch.tensor(8.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pager", ["none", "unified"])
def test_gradients_not_finite_leave_everything(pager: str) -> None:
    params = make_params("cuda")
    optimizer = PagedAdamW(params, pager=pager)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.zeros((), device="cuda"))
    for step in range(2):
        set_grads(params, step, 8.0)
        if step:
            params[2].grad[0, 0] = math.inf
            before = [param.detach().clone() for param in params]
        scaler.step(optimizer)
        scaler.update(8.0)
    assert all(map(torch.equal, params, before))
    assert all(float(optimizer.state[param]["step"]) == 1 for param in params)


def test_memory_is_freed_with_the_optimizer() -> None:
    params = [nn.Parameter(torch.zeros(1 << 22, device="cuda"))]
    for _ in range(3):
        optimizer = PagedAdamW(params, pager="unified", budget_bytes=4 << 20)
        set_grads(params, 0)
        optimizer.step()
        del optimizer
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    assert held <= 3 * params[0].nbytes
