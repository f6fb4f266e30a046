"""What ``accelerate launch`` runs in the tests: a tiny language model with 4-bit layers and LoRA.

Two ranks take the halves of each batch; one process takes both, one after the other, and so comes
to the same gradients, bit for bit: the mean of two has one rounding whoever takes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM

from qkern import optim
from qkern.integrations.accelerate import enable_fsdp_on_cpu
from qkern.integrations.transformers import QKernConfig
from tests.models import tiny_llama

STEPS = 4
VOCABULARY = 128


MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
}


def save_dense(folder: Path) -> None:
    """The models that the processes load, before anything is quantised."""
    for name, config in MODELS.items():
        tiny_llama(**config).save_pretrained(folder / name)


def make_model(folder: Path, kind: str = "untied") -> peft.PeftModel:
    """One that is quantised while it is loaded, with adapters.

    Of ``"tied_in_4_bits"`` table and head are one 4-bit weight.
    """
    options = QKernConfig(quantize_embeddings=kind == "tied_in_4_bits")
    model = AutoModelForCausalLM.from_pretrained(
        folder / kind.partition("_")[0], quantization_config=options, dtype=torch.float32
    )
    return adapted(model)


def adapted(model: nn.Module) -> peft.PeftModel:
    """``model`` with adapters that do something, always the same."""
    config = peft.LoraConfig(r=4, target_modules=r".*_proj", task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def make_optimizer(model: nn.Module, bits: int | None = None) -> torch.optim.Optimizer:
    """qkern's with ``bits``, else torch's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if bits is not None:
        return optim.PagedAdamW(trained, lr=1e-2, bits=bits, min_8bit_size=0)
    return torch.optim.AdamW(trained, lr=1e-2, foreach=False)


def batches(first: int, steps: int) -> Iterator[Tensor]:
    """Ids ``[2, 2, 6]``: of each step two halves."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        yield torch.randint(VOCABULARY, (2, 2, 6), generator=generator)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def state(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's tensors, whole, by the names that they have without what wraps it."""
    found = {}
    for name, tensor in model.state_dict().items():
        for wrapper in ("module.", "_checkpoint_wrapped_module."):
            name = name.replace(wrapper, "")
        found[name] = whole(tensor)
    return found


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int = 0,
    steps: int = STEPS,
) -> list[Tensor]:
    """The losses of the halves, ``[steps, 2]``; a rank has NaN for the other's."""
    halves = range(2) if accelerator.num_processes == 1 else [accelerator.process_index]
    losses = []
    for ids in batches(first, steps):
        optimizer.zero_grad()
        row = torch.full((2,), torch.nan)
        for half in halves:
            loss = model(input_ids=ids[half], labels=ids[half]).loss
            accelerator.backward(loss / len(halves))
            row[half] = loss.detach()
        optimizer.step()
        losses.append(row)
    return losses


def spoiled(model: nn.Module, rank: int) -> nn.Module:
    """``model`` with other tensors on every rank but the first, as one that has read no weights."""
    if rank > 0:
        for name, parameter in model.named_parameters():
            if not name.endswith("quant_meta"):
                parameter.data.zero_()
    return model


# DDP

DDP = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


def ddp(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in DDP.items():
        accelerator = Accelerator(
            cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**options)]
        )
        model = spoiled(make_model(folder), accelerator.process_index)
        model, optimizer = accelerator.prepare(model, make_optimizer(model))
        found[name] = {"losses": train(accelerator, model, optimizer), "state": state(model)}
        if name == "plain":
            found[name] |= saved(accelerator, model, folder / "ddp")
            train(accelerator, model, optimizer, STEPS)
            found["further"] = state(model)
        forget()
    found["accumulated"] = accumulated(folder)
    return found


def accumulated(folder: Path) -> dict[str, Any]:
    """Two steps' batches in one step: DDP sends gradients with the second only."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model(folder)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    sent = 0
    if isinstance(model, nn.parallel.DistributedDataParallel):

        def counted(_, bucket):  # torch looks at annotations
            nonlocal sent
            sent += 1
            future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0] / accelerator.num_processes)

        model.register_comm_hook(None, counted)
    halves = range(2) if accelerator.num_processes == 1 else [accelerator.process_index]
    for ids in batches(0, STEPS):
        with accelerator.accumulate(model):
            for half in halves:
                loss = model(input_ids=ids[half], labels=ids[half]).loss
                accelerator.backward(loss / len(halves))
            optimizer.step()
            optimizer.zero_grad()
    forget()
    return {"state": state(model), "sent": sent}


def saved(accelerator: Accelerator, model: nn.Module, folder: Path) -> dict[str, Any]:
    """What accelerate saves of a model, in each of its ways."""
    accelerator.save_state(str(folder / "state"))
    accelerator.save_model(model, str(folder / "model"))
    found = accelerator.get_state_dict(model)
    accelerator.wait_for_everyone()
    return {"whole": {name: tensor.clone() for name, tensor in (found or {}).items()}}


def forget() -> None:
    """Let the next Accelerator have other options."""
    AcceleratorState._reset_state()
    PartialState._shared_state.clear()  # its own method would end the process group
    GradientState._reset_state()


# FSDP2

FSDP: dict[str, dict[str, Any]] = {
    "as_launched": {},
    "full": {"state_dict_type": "full_state_dict", "cpu_ram_efficient_loading": False},
    "checkpointed": {"activation_checkpointing": True, "reshard_after_forward": False},
    "bfloat16": {},
    "tied": {},
    "tied_in_4_bits": {},
    "paged": {},
    "paged_8bit": {},
}
"""Options of the plugin, besides those of the configuration."""

PAGED = {"paged": 32, "paged_8bit": 8}


def fsdp_parts(folder: Path, name: str) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    enable_fsdp_on_cpu()
    options = dict(FSDP[name])
    if name == "bfloat16":
        options["mixed_precision_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    plugin = FullyShardedDataParallelPlugin(**options) if options else None
    mixed = "bf16" if name == "bfloat16" else "no"
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=mixed)
    assert accelerator.is_fsdp2
    efficient = accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    model = make_model(folder, name if "tied" in name else "untied")
    if efficient:
        spoiled(model, accelerator.process_index)
    return accelerator, *accelerator.prepare(model, make_optimizer(model, PAGED.get(name)))


def local_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all packed codes here, and of the whole of them."""
    here = everywhere = 0
    for parameter in model.parameters():
        if parameter.dtype == torch.uint8 and parameter.dim() == 2:
            local: Any = parameter
            here += local.to_local().numel()
            everywhere += parameter.numel()
    return here, everywhere


def fsdp(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in FSDP:
        accelerator, model, optimizer = fsdp_parts(folder, name)
        result: dict[str, Any] = {"bytes": local_bytes(model)}
        result["losses"] = train(accelerator, model, optimizer)
        result["state"] = state(model)
        result |= saved(accelerator, model, folder / "fsdp" / name)
        result["further_losses"] = train(accelerator, model, optimizer, STEPS)
        result["further"] = state(model)
        found[name] = result
        forget()
    return found


def fsdp_resumed(folder: Path) -> dict[str, Any]:
    """Go on from what other processes saved, however many they were."""
    found: dict[str, Any] = {}
    for name in ("as_launched", "full", "paged", "paged_8bit", "bfloat16"):
        accelerator, model, optimizer = fsdp_parts(folder, name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        accelerator.load_state(str(folder / "fsdp" / name / "state"))
        loaded = state(model)
        losses = train(accelerator, model, optimizer, STEPS)
        found[name] = {"loaded": loaded, "further_losses": losses, "further": state(model)}
        forget()
    return found


def ddp_resumed(folder: Path) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    model = make_model(folder)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    accelerator.load_state(str(folder / "ddp" / "state"))
    loaded = state(model)
    train(accelerator, model, optimizer, STEPS)
    return {"loaded": loaded, "further": state(model)}


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    function.__name__: function for function in (ddp, ddp_resumed, fsdp, fsdp_resumed)
}


def main() -> None:
    """Be one of the processes: ``-m tests.integrations.launched FOLDER RESULTS SCENARIO...``."""
    folder, results, scenarios = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    found = {scenario: SCENARIOS[scenario](folder) for scenario in scenarios}
    started = torch.distributed.is_initialized()  # not by accelerate for one process alone
    rank = torch.distributed.get_rank() if started else 0
    torch.save(found, results / f"{rank}.pt")
    if started:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
