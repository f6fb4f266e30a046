"""A program of two processes that train the same small model, replicated or sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qkern.optim import PagedAdamW
from tests.optim.processes import main

WORLD = 2
STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 1e-2, "max_grad_norm": 0.05, "weight_decay": 0.1}


def model() -> nn.Sequential:
    """Sizes that two processes do not share evenly, and some of several chunks of a file."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 301), nn.Tanh(), nn.Linear(301, 65), nn.Linear(65, 3))


def batches(first: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        yield torch.randn(8, 33, generator=generator), torch.randn(8, 3, generator=generator)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int, part: slice
) -> None:
    for x, y in batches(first, steps):
        optimizer.zero_grad()
        (net(x[part]) - y[part]).square().mean().backward()
        optimizer.step()


def part(rank: int) -> slice:
    """Of a batch: every process takes as many, so that the mean of means is the mean."""
    return slice(4 * rank, 4 * rank + 4)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def found(net: nn.Module, optimizer: PagedAdamW) -> dict[str, Any]:
    state = optimizer.state_dict()["state"]
    return {
        "params": [whole(p.detach()).clone() for p in net.parameters()],
        "state": [{k: whole(v).clone() for k, v in state[i].items()} for i in sorted(state)],
        "grad_norm": optimizer.grad_norm,
    }


def ddp(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = PagedAdamW(net.parameters(), **options(rank, folder, pager), bits=8)
    train(net, optimizer, 0, STEPS, part(rank))
    return found(net, optimizer)


def sharded() -> nn.Sequential:
    net = model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def options(rank: int, folder: Path, pager: str, name: str = "state") -> dict[str, Any]:
    if pager == "none":
        return OPTIONS
    return OPTIONS | {"path": folder / f"{name}{rank}", "budget_bytes": 64 << 10}


def fsdp(rank: int, folder: Path, pager: str, **more: Any) -> dict[str, Any]:
    net = sharded()
    optimizer = PagedAdamW(net.parameters(), **options(rank, folder, pager), **more)
    train(net, optimizer, 0, STEPS, part(rank))
    return found(net, optimizer)


def fsdp_8bit(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    return fsdp(rank, folder, pager, bits=8, min_8bit_size=64)


def fsdp_checkpoint(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    """Half the steps; then through files of both kinds, and through one whole state, to the end."""
    results = {}
    for kind in ("sharded", "full"):
        net = sharded()
        optimizer = PagedAdamW(net.parameters(), **options(rank, folder, pager, f"{kind}-a-"))
        train(net, optimizer, 0, STEPS // 2, part(rank))
        how = StateDictOptions(full_state_dict=kind == "full", cpu_offload=kind == "full")
        state = get_optimizer_state_dict(net, optimizer, options=how)
        net.zero_grad()  # torch gives an optimizer a state only where no gradient is
        other = "none" if pager == "mmap" else "mmap"  # and across pagers
        again = PagedAdamW(net.parameters(), **options(rank, folder, other, f"{kind}-b-"))
        if kind == "sharded":
            save(state, storage_writer=FileSystemWriter(folder / "checkpoint"))
            state = get_optimizer_state_dict(net, again, options=how)
            load(state, storage_reader=FileSystemReader(folder / "checkpoint"))
        else:
            how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            state = copy.deepcopy(state) if rank == 0 else {}
        set_optimizer_state_dict(net, again, state, options=how)
        train(net, again, STEPS // 2, STEPS - STEPS // 2, part(rank))
        results[kind] = found(net, again)
    return results


def fsdp_resume(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    """Closed half way, and opened again with the parameters as they are."""
    assert pager == "mmap"
    net = sharded()
    for first, resume in ((0, False), (STEPS // 2, True)):
        optimizer = PagedAdamW(net.parameters(), **options(rank, folder, pager), resume=resume)
        train(net, optimizer, first, STEPS // 2, part(rank))
        if not resume:
            optimizer.close()
    return found(net, optimizer)


SCENARIOS = {f.__name__: f for f in (ddp, fsdp, fsdp_8bit, fsdp_checkpoint, fsdp_resume)}


if __name__ == "__main__":
    main(SCENARIOS)
