"""A small LoRA model trained by several processes: ``test_distributed.py`` runs them.

Two ranks take the halves of each batch. The mean of two gradients has one rounding whoever takes
it, so one process that accumulates the halves must come to the very same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from qkern import nn as qnn
from tests import experts_of_models
from tests.optim.processes import main

STEPS = 5
QUANTISED = ("weight", "absmax", "nested_absmax", "nested_offset", "codebook", "quant_meta")


class Block(nn.Module):
    """Sizes that two processes do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(65)
        self.up = nn.Linear(65, 301)
        self.down = nn.Linear(301, 65, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, checkpointed: bool, reentrant: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(37, 65)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(65, 3)
        self.checkpointed, self.reentrant = checkpointed, reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        if self.reentrant:
            x.requires_grad_()  # else torch's older way gives no gradients
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=self.reentrant)
                if self.checkpointed
                else block(x)
            )
        return self.head(x)


def model(mode: str, codebook: Tensor | None = None) -> Model:
    """4-bit blocks and table, adapters that do something, a dense head; all else frozen."""
    torch.manual_seed(0)
    net = Model("checkpointed" in mode, "reentrant" in mode)
    format = "nf4" if codebook is None else "custom"
    qnn.quantize_model(
        net, format, codebook=codebook, skip=["head"], lora=qnn.LoRAConfig(r=4, alpha=8)
    )
    net.table = qnn.Embedding4bit.from_embedding(net.table)
    for _, layer in qnn.lora_layers(net):
        nn.init.normal_(layer.lora_b, std=0.1)
    return net


def batches(first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(37, (2, 6, 5), generator=generator)
        yield ids, torch.randn(2, 6, 5, 3, generator=generator)


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=1e-2, foreach=False
    )


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y.float() - target).square().mean()


def train(net: nn.Module, rank: int) -> list[Tensor]:
    """The losses of a rank's halves."""
    optim, losses = optimizer(net), []
    for ids, target in batches():
        loss = loss_of(net(ids[rank]), target[rank])
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.detach())
    return losses


def train_alone(mode: str) -> tuple[Model, list[list[Tensor]]]:
    """The model that one process trains, and the losses of both halves, by rank.

    As under a policy of 16 bits every floating parameter and every block's input is cast for the
    forward, and a gradient is cast back and summed in float32. Nothing is recomputed.
    """
    net = model(mode.partition("-")[0])
    dtype = torch.bfloat16 if "bfloat16" in mode else None
    if dtype is not None:
        for block in net.blocks:
            block.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    optim, losses = optimizer(net), [[], []]
    for ids, target in batches():
        optim.zero_grad()
        for rank in range(2):
            cast = {
                name: p.to(dtype) if dtype is not None and p.is_floating_point() else p
                for name, p in net.named_parameters()
            }
            loss = loss_of(torch.func.functional_call(net, cast, (ids[rank],)), target[rank])
            loss.backward()
            losses[rank].append(loss.detach())
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        optim.step()
    return net, losses


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in net.state_dict().items()}


# One process among others

MODES = ("float32", "bfloat16", "float32-checkpointed", "bfloat16-checkpointed", "float32-layers")
"""The dtype of the policy; whether activations are recomputed, or every base is a unit itself."""


def sharded(mode: str, device: str = "cpu", **options: Any) -> Model:
    with torch.device(device):
        net = model(mode, **options)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if "bfloat16" in mode else None, reduce_dtype=torch.float32
    )
    how: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": policy,
    }
    for module in [*net.modules()]:
        if "layers" in mode and isinstance(module, qnn.Linear4bit):
            fully_shard(module, **how)
    for block in net.blocks:
        fully_shard(block, **how)
    return fully_shard(net, **how)


def local_bytes(net: nn.Module) -> dict[str, tuple[int, int]]:
    """Of every tensor of a 4-bit weight: bytes here, and bytes of the whole."""
    found = {}
    for name, parameter in net.named_parameters():
        if not parameter.is_floating_point():
            assert isinstance(parameter, DTensor), name
            local = parameter.to_local()
            found[name] = (local.untyped_storage().nbytes(), parameter.numel() * local.itemsize)
    return found


def ddp(rank: int, folder: Path, _: str) -> dict[str, Any]:
    net = nn.parallel.DistributedDataParallel(model("float32"))
    result: dict[str, Any] = {"losses": train(net, rank), "state": state(net.module)}
    # The construction made them equal once; from here on a rank's weights are its own.
    weight = net.module.blocks[0].up.base_layer.weight
    if rank == 1:
        weight.data ^= 0xFF
    own, broadcasts = weight.detach().clone(), []
    for name in ("_broadcast_coalesced", "broadcast"):
        original = getattr(dist, name)

        def counted(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            broadcasts.append(args)
            return _original(*args, **kwargs)

        setattr(dist, name, counted)
    train(net, rank)
    return result | {"kept": torch.equal(weight, own), "broadcasts": len(broadcasts)}


DDP_MODES = ("float32-checkpointed", "float32-checkpointed-reentrant")


def ddp_checkpointed(rank: int, folder: Path, _: str) -> dict[str, Any]:
    """Activations are recomputed in backward, in either of torch's ways."""
    found: dict[str, Any] = {}
    for mode in DDP_MODES:
        net = nn.parallel.DistributedDataParallel(model(mode))
        found[mode] = {"losses": train(net, rank), "state": state(net.module)}
    return found


def fsdp(rank: int, folder: Path, _: str) -> dict[str, Any]:
    return {mode: train_sharded(mode, rank, folder) for mode in MODES}


def train_sharded(mode: str, rank: int, folder: Path) -> dict[str, Any]:
    net = sharded(mode)
    seen: dict[str, list[Tensor]] = {}
    for name, layer in net.named_modules():
        if isinstance(layer, qnn.Linear4bit):
            found = seen.setdefault(name, [])
            outer = layer if "layers" in mode else net.get_submodule(name.rpartition(".")[0])
            outer.register_forward_hook(
                lambda *_, layer=layer, found=found: found.append(layer.quantized.dequantize()),
                prepend=True,  # before the weights go again
            )
    before = local_bytes(net)
    losses = train(net, rank)
    assert local_bytes(net) == before
    result = {"losses": losses, "state": state(net), "bytes": before, "seen": seen}
    try:
        net.blocks[0].up.quantized  # noqa: B018
    except RuntimeError as error:
        result["refused"] = str(error)
    save(get_model_state_dict(net), storage_writer=FileSystemWriter(folder / mode))
    return result


def fsdp_reload(rank: int, folder: Path, _: str) -> dict[str, Any]:
    """Into other ranks' models: from a checkpoint in shards, and from the whole state of rank 0."""
    net = sharded("float32")
    train(net, rank)
    found: dict[str, Any] = {"expected": state(net)}
    save(get_model_state_dict(net), storage_writer=FileSystemWriter(folder / "checkpoint"))
    again = sharded("float32")
    shards = get_model_state_dict(again)
    load(shards, storage_reader=FileSystemReader(folder / "checkpoint"))
    set_model_state_dict(again, shards)
    found["shards"] = state(again)
    again = sharded("float32", device="meta").to_empty(device="cpu")
    assert all(p.is_meta is False for p in again.parameters())
    found["meta"] = [
        whole(layer.quant_meta) for layer in (again.table, again.blocks[1].down.base_layer)
    ]
    shards = get_model_state_dict(again)
    load(shards, storage_reader=FileSystemReader(folder / "checkpoint"))
    set_model_state_dict(again, shards)
    found["empty"] = state(again)
    how = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(net, options=how)
    again = sharded("float32")
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, full if rank == 0 else {}, options=how)
    found["full"] = state(again)
    other = sharded("float32", codebook=torch.linspace(-1, 1, 16))
    try:
        set_model_state_dict(
            other, get_model_state_dict(net), options=StateDictOptions(strict=False)
        )
    except RuntimeError as error:
        found["refused"] = str(error)
    return found


def mixture() -> Any:
    """Two layers of experts, 4-bit with adapters on all of them."""
    net = experts_of_models.quantised("mixtral", lora=qnn.LoRAConfig(r=4, alpha=8))
    for _, layer in qnn.lora_layers(net):
        nn.init.normal_(layer.lora_b, std=0.1)
    return net.train()


def train_mixture(net: Any, ranks: Iterable[int]) -> list[Tensor]:
    """The losses of the rows of these ranks, by turns; their gradients' mean is applied."""
    optim, losses, ranks = optimizer(net), [], [*ranks]
    ids = experts_of_models.IDS
    for _ in range(3):
        optim.zero_grad()
        for rank in ranks:
            loss = net(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss
            loss.backward()
            losses.append(loss.detach())
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(ranks)
        optim.step()
    return losses


def fsdp_experts(rank: int, folder: Path, _: str) -> dict[str, Any]:
    """Experts whose codes are shared out by expert."""
    net = mixture()
    how: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    for layer in net.model.layers:
        fully_shard(layer, **how)
    fully_shard(net, **how)
    before = local_bytes(net)
    losses = train_mixture(net, [rank])
    assert local_bytes(net) == before
    save(get_model_state_dict(net), storage_writer=FileSystemWriter(folder / "experts"))
    return {"losses": losses, "state": state(net), "bytes": before}


SCENARIOS = {f.__name__: f for f in (ddp, ddp_checkpointed, fsdp, fsdp_reload, fsdp_experts)}


if __name__ == "__main__":
    main(SCENARIOS)
