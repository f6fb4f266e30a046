"""accelerate's hooks and loaders on 4-bit weights: they move like dense ones, and keep every bit.

On a CPU alone the weights are on the meta device between two calls.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.utils import compute_module_sizes, set_module_tensor_to_device
from safetensors.torch import save_file
from torch import Tensor, nn

from qkern import io, testing
from qkern import nn as qnn
from tests.models import tiny_llama

IDS = torch.arange(12).view(2, 6)
QUANTISED = ("weight", "absmax", "nested_absmax", "nested_offset", "quant_meta")


class Model(nn.Module):
    """A table, two linear layers and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64)
        self.head = nn.Linear(64, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.norm(self.up(self.table(ids))))))


def quantised(lora: bool = False) -> Model:
    torch.manual_seed(0)
    model = Model().eval()
    config = qnn.LoRAConfig(r=4) if lora else None
    qnn.quantize_model(model, skip=["head"], lora=config)
    for layer in qnn.lora_parameters(model):
        nn.init.normal_(layer, std=0.1)
    model.table = qnn.Embedding4bit.from_embedding(model.table)
    return model


def on_cpu(model: Model, folder: Path) -> None:
    cpu_offload(model, execution_device="cpu")


def on_disk(model: Model, folder: Path) -> None:
    disk_offload(model, folder / "offload", execution_device="cpu")


def dispatched(model: Model, folder: Path) -> None:
    places = {"table": "cpu", "up": "disk", "norm": "cpu", "down": "disk", "head": "cpu"}
    dispatch_model(
        model, places, main_device="cpu", offload_dir=folder / "offload", force_hooks=True
    )


OFFLOADS = pytest.mark.parametrize("offload", [on_cpu, on_disk, dispatched])


def assert_away(model: Model, offload: Callable[[Model, Path], None]) -> None:
    """The tensors of the 4-bit layers are not where they are computed with."""
    for layer in (model.up, model.down):
        base = layer.base_layer if isinstance(layer, qnn.LoRALinear) else layer
        assert isinstance(base, qnn.Linear4bit)
        assert all(getattr(base, name).is_meta for name in QUANTISED)
    if offload is not dispatched:
        assert all(parameter.is_meta for parameter in model.parameters())


@OFFLOADS
@pytest.mark.parametrize("lora", [False, True])
def test_offloaded_models_give_the_same_bits(
    offload: Callable[[Model, Path], None], lora: bool, tmp_path: Path
) -> None:
    model = quantised(lora)
    inputs = [IDS, IDS[:1, :1], IDS]  # as in generation, call after call
    expected = [model(ids) for ids in inputs]
    offload(model, tmp_path)
    assert_away(model, offload)
    for ids, y in zip(inputs, expected, strict=True):
        testing.assert_bitwise(model(ids), y)
        assert_away(model, offload)


def test_nothing_keeps_what_was_loaded_for_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised()
    on_disk(model, tmp_path)
    seen = []
    original = qnn.linear.linear_by_weight

    def spy(x, weight, *rest):
        seen.append(weakref.ref(weight.packed.untyped_storage()))
        assert seen[-1]().nbytes() == 64 * 96 // 2
        return original(x, weight, *rest)

    monkeypatch.setattr(qnn.linear, "linear_by_weight", spy)
    with torch.no_grad():
        model(IDS)
    assert len(seen) == 2
    assert all(storage() is None for storage in seen)


def test_generation_from_the_disk(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    qnn.quantize_model(model, lora=qnn.LoRAConfig(r=4))
    for parameter in qnn.lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **options)
    disk_offload(model, tmp_path, execution_device="cpu")
    assert model.model.layers[0].mlp.up_proj.base_layer.weight.is_meta
    assert torch.equal(model.generate(IDS, **options), expected)


def test_training_below_hooks_that_do_not_offload() -> None:
    """What accelerate offloads cannot be trained, of any layer: each call has new parameters."""
    model, hooked = quantised(lora=True), quantised(lora=True)
    dispatch_model(hooked, {"": "cpu"}, main_device="cpu", force_hooks=True)
    losses = []
    for net in (model, hooked):
        optimizer = torch.optim.SGD(qnn.lora_parameters(net), lr=0.1)
        losses.append([])
        for _ in range(3):
            loss = net(IDS).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    # The base's part and the adapter's are two gradients of x here, each rounded.
    testing.assert_bitwise(losses[0][0], losses[1][0])
    assert losses[0][2] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_gradients_pass_through_offloaded_layers(tmp_path: Path) -> None:
    model = quantised()
    x = torch.randn(4, 64, requires_grad=True)
    part = nn.Sequential(model.up, model.norm, model.down)
    part(x).square().sum().backward()
    expected = x.grad.clone()
    disk_offload(part, tmp_path, execution_device="cpu")
    x.grad = None
    part(x).square().sum().backward()
    testing.assert_bitwise(x.grad, expected)
    assert all(parameter.is_meta for parameter in part.parameters())


# Loading


@pytest.mark.parametrize("up", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_load_checkpoint_and_dispatch(up: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = quantised()
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with init_empty_weights():
        other = quantised()
    assert all(parameter.is_meta for parameter in other.parameters())
    load_checkpoint_and_dispatch(
        other,
        str(tmp_path / "model.safetensors"),
        device_map=dict.fromkeys(("table", "norm", "down", "head"), "cpu") | {"up": up},
        offload_folder=str(tmp_path / "offload"),
        dtype=dtype,
        strict=True,
    )
    testing.assert_bitwise(other(IDS), model(IDS))
    assert other.up.weight.is_meta == (up == "disk")


def test_init_empty_weights_keeps_the_metadata() -> None:
    with init_empty_weights():
        model = quantised()
    assert model.up.extra_repr() == quantised().up.extra_repr()
    model.load_state_dict(quantised().state_dict(), assign=True)
    testing.assert_bitwise(model(IDS), quantised()(IDS))


def test_sizes_are_those_of_the_packed_bytes() -> None:
    model = quantised()
    for dtype in (None, torch.bfloat16):
        sizes = compute_module_sizes(model, dtype=dtype)
        for name in QUANTISED:
            assert sizes[f"up.{name}"] == getattr(model.up, name).nbytes
    assert sizes["up.weight"] == 64 * 96 // 2
    assert sizes["up"] < 64 * 96 * 0.6


def test_single_tensors_are_set_by_their_own_shape_only() -> None:
    layer, other = quantised().up, qnn.Linear4bit.from_linear(nn.Linear(64, 96))
    x = torch.randn(3, 64)
    for name, parameter in other.named_parameters():
        set_module_tensor_to_device(layer, name, "cpu", value=parameter.detach().clone())
        assert type(getattr(layer, name)) is nn.Parameter
    testing.assert_bitwise(layer(x), other(x))
    set_module_tensor_to_device(layer, "weight", "meta")
    assert layer.weight.is_meta
    with pytest.raises(ValueError, match="Trying to set a tensor"):
        set_module_tensor_to_device(layer, "weight", "cpu", value=torch.zeros(96, 64))
    set_module_tensor_to_device(layer, "weight", "cpu", value=other.weight.detach())
    testing.assert_bitwise(layer(x), other(x))


def test_a_class_name_does_not_make_it_bitsandbytes() -> None:
    """accelerate assigns ``module.weight.to(device)`` to what is called Linear4bit."""
    layer = copy.deepcopy(quantised().up)
    assert type(layer).__name__ == "Linear4bit"
    layer.weight = layer.weight.to("cpu", copy=True)
    assert type(layer.weight) is nn.Parameter
    testing.assert_bitwise(layer(torch.ones(1, 64)), quantised().up(torch.ones(1, 64)))


def test_an_offloaded_model_does_not_merge_or_save(tmp_path: Path) -> None:
    model = cpu_offload(qnn.add_lora(quantised(), qnn.LoRAConfig(r=4, targets=["up"])), "cpu")
    expected = model(IDS)
    with pytest.raises(RuntimeError, match="base_layer: its forward was replaced, as accelerate"):
        qnn.merge_lora(model)
    testing.assert_bitwise(model(IDS), expected)
    with pytest.raises(RuntimeError, match="meta tensors"):
        io.save_bnb(model.up, tmp_path / "up.safetensors")
