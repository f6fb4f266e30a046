"""Names in files are the model's own: wrappers leave no trace, and nothing else goes."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel

from qkern import io
from qkern import nn as qnn
from tests.io.llamas import randomised

OWN_NAMES = (
    "base_layer",
    "module",
    "_orig_mod",
    "_forward_module",
    "_original_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "model",
    "lora_A",
    "weight_",
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in OWN_NAMES:
            setattr(self, name, nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block(x))


def parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


X = torch.linspace(-1, 1, 192).view(3, 64)


@pytest.mark.parametrize("lora", [False, True])
def test_submodules_of_any_name_survive_in_checkpoints(lora, tmp_path):
    model = qnn.quantize_model(Net())
    if lora:
        qnn.add_lora(model, qnn.LoRAConfig(r=2))
    io.save_bnb(model, tmp_path / "model.safetensors")
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name for name in names if ".weight." not in name} == parameter_names(Net())
    loaded = io.load_bnb(Net(), tmp_path)
    assert torch.equal(loaded(X), model(X))


def test_submodules_of_any_name_survive_in_adapters(tmp_path):
    model = randomised(qnn.add_lora(Net(), qnn.LoRAConfig(r=2)))
    for name in OWN_NAMES:
        norm = model.block.get_submodule(name)[1]
        nn.init.normal_(norm.weight.requires_grad_(True))
    io.save_adapter(model, tmp_path)
    assert torch.equal(io.load_adapter(Net(), tmp_path)(X), model(X))
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-4, atol=1e-5)


class _FabricModule(nn.Module):
    """Lightning Fabric's wrapper, which holds what it wraps twice."""

    __module__ = "lightning.fabric.wrappers"

    def __init__(self, module: nn.Module, inner: nn.Module | None = None) -> None:
        super().__init__()
        self._forward_module = module
        self._original_module = module if inner is None else inner


class DeepSpeedEngine(nn.Module):
    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Subclass(nn.DataParallel):
    pass


WRAPPERS = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "subclass": Subclass,
    "recomputed": checkpoint_wrapper,
    "averaged": AveragedModel,
    "deepspeed": DeepSpeedEngine,
    "fabric": _FabricModule,
    "several": lambda model: _FabricModule(DeepSpeedEngine(torch.compile(model)), model),
    "recomputed in compiled": lambda model: torch.compile(checkpoint_wrapper(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inside", [False, True])
def test_wrappers_leave_no_trace(wrapper, inside, tmp_path):
    def make() -> Net:
        return qnn.quantize_model(Net(), targets=["0", "fc"])

    def wrapped(model: Net) -> nn.Module:
        if not inside:
            return WRAPPERS[wrapper](model)
        model.block.module = WRAPPERS[wrapper](model.block.module)
        model.fc = WRAPPERS[wrapper](model.fc)
        return model

    config = qnn.LoRAConfig(r=2, rank_pattern={"^block.module.0": 4})
    model = randomised(qnn.add_lora(make(), config))
    model.block.module[1].requires_grad_(True)
    io.save_adapter(model, tmp_path / "plain")
    other = wrapped(copy.deepcopy(model))
    io.save_adapter(other, tmp_path / "wrapped")
    plain, found = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("plain", "wrapped")
    )
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    configs = [(tmp_path / d / "adapter_config.json").read_text() for d in ("plain", "wrapped")]
    assert configs[0] == configs[1]
    # Back into a wrapped model, with adapters and without.
    assert torch.equal(io.load_adapter(make(), tmp_path / "wrapped")(X), model(X))
    io.load_adapter(other, tmp_path / "plain")
    if "compiled" not in wrapper:
        fresh = wrapped(make())
        io.load_adapter(fresh, tmp_path / "plain")
        assert sum(1 for _ in qnn.lora_layers(fresh)) >= len(OWN_NAMES) + 1
    with qnn.disable_lora(model), qnn.disable_lora(other):
        io.save_bnb(model, tmp_path / "plain.safetensors")
        io.save_bnb(other, tmp_path / "wrapped.safetensors")
    names = [load_file(tmp_path / f"{d}.safetensors").keys() for d in ("plain", "wrapped")]
    assert names[0] == names[1]
    io.load_bnb(wrapped(Net()), tmp_path / "plain.safetensors")


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.parallel.DistributedDataParallel,
        lambda m: FullyShardedDataParallel(m, use_orig_params=True, device_id=torch.device("cpu")),
    ],
    ids=["ddp", "fsdp"],
)
def test_distributed_wrappers_leave_no_trace(wrap, tmp_path):
    model = randomised(qnn.add_lora(Net(), qnn.LoRAConfig(r=2)))
    io.save_adapter(model, tmp_path / "plain")
    io.save_adapter(wrap(model), tmp_path / "wrapped")
    plain, found = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("plain", "wrapped")
    )
    assert plain.keys() == found.keys()


@pytest.mark.usefixtures("process_group")
def test_shards_are_gathered(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = randomised(qnn.quantize_model(Net(), lora=qnn.LoRAConfig(r=2)))
    model.block.module[1].requires_grad_(True)
    io.save_adapter(model, tmp_path / "whole")
    before = load_file(tmp_path / "whole/adapter_model.safetensors")
    io.save_adapter(fully_shard(model), tmp_path / "sharded")
    after = load_file(tmp_path / "sharded/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="is sharded in the model; load the adapter before"):
        io.load_adapter(model, tmp_path / "whole")


def test_shards_that_nothing_gathers_are_refused(tmp_path):
    """DeepSpeed leaves empty parameters, and older FSDP flat ones, in the place of shards."""
    model = qnn.add_lora(Net(), qnn.LoRAConfig(r=2))
    model.fc.lora_b.data = model.fc.lora_b.data.view(-1)[:64]
    with pytest.raises(ValueError, match=r"fc.lora_b: got shape \[64\]; takes \[64, 2\]"):
        io.save_adapter(model, tmp_path)
    model = qnn.add_lora(Net(), qnn.LoRAConfig(r=2))
    norm = model.block.module[1]
    norm.weight = nn.Parameter(torch.empty(0))
    norm.weight.ds_id = 3
    with pytest.raises(ValueError, match=r"block.module.1.weight: is partitioned by DeepSpeed"):
        io.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_tensors_of_one_name_are_refused(tmp_path):
    model = nn.Sequential(torch.compile(nn.Linear(64, 64)))
    qnn.quantize_model(model)
    model[0]._parameters["bias"] = nn.Parameter(torch.ones(64))
    with pytest.raises(
        ValueError, match=r"0.bias and 0._orig_mod.bias would both be called 0.bias"
    ):
        io.save_bnb(model, tmp_path / "model.safetensors")


class Names(nn.Module):
    """Layers whose paths begin and end alike, or hold what means something in a pattern."""

    PATHS = ("fc", "xfc", "block.fc", "block.block.fc", "fc1.fc", "h.1.fc", "h.11.fc", "a+b.fc")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for path in self.PATHS:
            parent: nn.Module = self
            *parents, name = path.split(".")
            for part in parents:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(name, nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for path in self.PATHS:
            x = self.get_submodule(path)(x) + x
        return x


@pytest.mark.parametrize("chosen", [*Names.PATHS, "all"])
@pytest.mark.parametrize("odd", Names.PATHS)
def test_targets_and_patterns_select_the_layers_meant(chosen, odd, tmp_path):
    model = Names().requires_grad_(False)
    paths = Names.PATHS if chosen == "all" else {chosen, "xfc"}
    for path in paths:
        parent, _, name = path.rpartition(".")
        r, alpha = (4, 3.5) if path == odd else (2, 2)
        layer = qnn.LoRALinear(model.get_submodule(path), r, alpha)
        setattr(model.get_submodule(parent), name, layer)
    randomised(model)
    io.save_adapter(model, tmp_path)
    x = torch.randn(3, 32)
    assert torch.equal(io.load_adapter(Names(), tmp_path)(x), model(x))
    theirs = peft.PeftModel.from_pretrained(Names(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted == set(paths)


def test_patterns_are_plain_paths_where_these_are_enough(tmp_path):
    """Versions of PEFT before 0.14 do not read an anchor."""
    model = qnn.add_lora(
        Names(), qnn.LoRAConfig(r=2, rank_pattern={"^fc": 8, "h.11.fc": 4, r"a\+b.fc": 3})
    )
    io.save_adapter(model, tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert found == {"^fc": 8, "h.11.fc": 4, r"^a\+b\.fc": 3}
