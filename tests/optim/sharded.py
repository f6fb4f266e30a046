"""A program of several processes with 8-bit moments of sharded parameters.

Gradients are given, not computed, so that any number of processes has the same ones to the bit.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lab.fake_gpu import FakeGpu
from qkern.optim import PagedAdamW, _driver
from tests.optim.processes import main

HALF = 3  # steps before a checkpoint, and after it
LEAST = 60  # elements of a parameter that has 8 bits
OPTIONS: dict[str, Any] = {"lr": 1e-2, "bits": 8, "min_8bit_size": LEAST}
KINDS = ("distributed", "flat", "full")


class Layers(nn.ParameterList):
    """Shards of whole blocks on any number of ranks, on two; of broken ones; a rank without any."""

    SHAPES = ((24, 256), (16, 64), (301, 33), (301,), (1, 65), (3,), (4, 5, 77))

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).to(dtype) for shape in self.SHAPES]
        super().__init__([nn.Parameter(param) for param in params])


def like(tensor: Tensor, param: Tensor) -> Tensor:
    """The whole tensor, sharded as ``param`` is."""
    if isinstance(param, DTensor):
        return distribute_tensor(tensor, param.device_mesh, param.placements)
    return tensor


def set_grads(params: Sequence[Tensor], step: int) -> None:
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        grad = torch.randn(param.shape, generator=generator) * 10.0 ** (index % 3 - 2)
        param.grad = like(grad.to(param.dtype), param)


def train(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], first: int, steps: int = HALF
) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def found(params: Sequence[Tensor], optimizer: PagedAdamW) -> dict[str, Any]:
    state = optimizer.state_dict()["state"]
    return {
        "params": [whole(param) for param in params],
        "state": [{k: whole(v) for k, v in state[i].items()} for i in sorted(state)],
        "grad_norm": optimizer.grad_norm,
    }


def sharded(dtype: torch.dtype = torch.float32) -> Layers:
    net = Layers(dtype)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return net


def make(net: nn.Module, pager: str, folder: Path, **more: Any) -> PagedAdamW:
    options = OPTIONS | more
    if pager != "none":
        options |= {"pager": pager, "budget_bytes": 64 << 10}
    if pager == "unified":
        _driver.current = FakeGpu(eagerness=1.0)
    if pager == "mmap":
        options |= {"path": folder / f"state-{os.getpid()}-{len(list(folder.iterdir()))}"}
    return PagedAdamW(net.parameters(), **options)


def straight(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    net = sharded()
    params = list(net.parameters())
    optimizer = make(net, pager, folder)
    train(optimizer, params, 0, 2 * HALF)
    kept = optimizer.state_dict()["state"]
    local = [{k: v for k, v in kept[i].items() if isinstance(v, DTensor)} for i in sorted(kept)]
    for param, state in zip(params, local, strict=True):
        assert isinstance(param, DTensor)
        for moment in state.values():
            assert moment.dtype == torch.float32
            assert moment.placements == param.placements
            assert moment.to_local().shape == param.to_local().shape
    result = found(params, optimizer)
    result["shards"] = [p.to_local().numel() for p in params if isinstance(p, DTensor)]
    if pager == "none":
        result["bits"] = [optimizer.state[param]["exp_avg"].element_size() * 8 for param in params]
    return result


def saved(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    """Trains the first half and leaves checkpoints in ``folder``."""
    net = sharded()
    params = list(net.parameters())
    optimizer = make(net, pager, folder)
    train(optimizer, params, 0)
    optimizer.zero_grad()
    for kind in KINDS:
        state = get_optimizer_state_dict(net, optimizer, options=how(kind))
        if kind == "full":
            torch.save(state, folder / f"full-{rank}")
        else:
            save(state, storage_writer=FileSystemWriter(folder / kind))
    torch.save(optimizer.state_dict(), folder / f"own-{rank}")
    result = found(params, optimizer)
    if rank == 0:
        torch.save(result["params"], folder / "params")
    return result


def how(kind: str) -> StateDictOptions:
    if kind == "full":
        return StateDictOptions(full_state_dict=True, cpu_offload=True)
    return StateDictOptions(flatten_optimizer_state_dict=kind == "flat")


def loaded(rank: int, folder: Path, pager: str, **more: Any) -> dict[str, Any]:
    """Each of the checkpoints in ``folder``, and the second half of the training from there."""
    results = {}
    # torch tells the keys of a flat state by the optimizer's own, which a pager has elsewhere.
    for kind in KINDS if pager == "none" else ("distributed", "full"):
        net = sharded()
        params = list(net.parameters())
        with torch.no_grad():
            for param, value in zip(params, torch.load(folder / "params"), strict=True):
                param.copy_(like(value, param))
        optimizer = make(net, pager, folder, **more)
        options = how(kind)
        if kind == "full":
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            state = torch.load(folder / "full-0") if rank == 0 else {}
        else:
            state = get_optimizer_state_dict(net, optimizer, options=options)
            load(state, storage_reader=FileSystemReader(folder / kind))
        set_optimizer_state_dict(net, optimizer, state, options=options)
        train(optimizer, params, HALF)
        results[kind] = found(params, optimizer)
    return results


def loaded_in_32_bits(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    return loaded(rank, folder, pager, bits=32)


def own_state(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    """Through ``state_dict`` and ``load_state_dict`` alone, each rank for itself; and deepcopy."""
    net = sharded()
    params = list(net.parameters())
    optimizer = make(net, pager, folder)
    train(optimizer, params, 0)
    again = make(net, "mmap" if pager == "none" else "none", folder)
    again.load_state_dict(optimizer.state_dict())
    train(again, params, HALF)
    result = {"own": found(params, again)}
    if pager == "none":
        net = sharded()
        first = make(net, pager, folder)
        train(first, list(net.parameters()), 0)
        second = copy.deepcopy(first)
        params = second.param_groups[0]["params"]
        train(second, params, HALF)
        result["copy"] = found(params, second)
    return result


def placed(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    """Sharded by another dimension, and replicated: no FSDP, plain DTensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = {}
    for name, placement in (("columns", Shard(1)), ("replicated", Replicate())):
        wholes = [param.detach() for param in Layers() if param.dim() > 1]
        params = [nn.Parameter(distribute_tensor(t, mesh, [placement])) for t in wholes]
        holder = nn.ParameterList(params)
        optimizer = make(holder, pager, folder)
        train(optimizer, params, 0)
        again = make(holder, "none", folder)
        again.load_state_dict(optimizer.state_dict())
        train(again, params, HALF)
        results[name] = found(params, again)
    return results


def clipped(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    """Low-precision parameters, whose norms are taken in float32."""
    net = sharded(torch.bfloat16)
    params = list(net.parameters())
    optimizer = make(net, pager, folder, max_grad_norm=0.5)
    train(optimizer, params, 0)
    return found(params, optimizer)


def beside_unsharded(rank: int, folder: Path, pager: str) -> dict[str, Any]:
    """From sharded parameters to plain ones and back, by a distributed checkpoint."""
    results: dict[str, Any] = {}
    for name, start, to, bits in (
        ("to 32 bits", sharded(), Layers(), 32),
        ("to 8 bits", sharded(), Layers(), 8),
        ("from 8 bits", Layers(), sharded(), 8),
    ):
        params = list(start.parameters())
        optimizer = make(start, "none", folder)
        train(optimizer, params, 0)
        optimizer.zero_grad()
        state = get_optimizer_state_dict(start, optimizer)
        save(state, storage_writer=FileSystemWriter(folder / name))
        for param, value in zip(to.parameters(), params, strict=True):
            param.data.copy_(like(whole(value), param))
        again = make(to, "none", folder, bits=bits)
        try:
            state = get_optimizer_state_dict(to, again)
            load(state, storage_reader=FileSystemReader(folder / name))
            set_optimizer_state_dict(to, again, state)
        except (ValueError, CheckpointException) as error:
            results[name] = str(error)
        else:
            train(again, list(to.parameters()), HALF)
            results[name] = found(list(to.parameters()), again)["params"]
    return results


SCENARIOS = {
    f.__name__: f
    for f in (
        straight,
        saved,
        loaded,
        loaded_in_32_bits,
        own_state,
        placed,
        clipped,
        beside_unsharded,
    )
}

if __name__ == "__main__":
    main(SCENARIOS)
