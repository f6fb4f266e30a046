"""Adapters on 4-bit layers that accelerate keeps on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qkern.nn import Linear4bit
from tests.integrations.models_of_transformers import IDS, load, logits, saved_llama
from tests.integrations.test_transformers_places import MAP
from tests.integrations.twins import error, shake

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

pytest_plugins = "tests.integrations.peft_fixtures"
pytestmark = pytest.mark.usefixtures("qkern_peft")

OPTIONS: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def offloaded(folder: Path, tmp_path: Path) -> Any:
    """A model of two blocks, the second on the disk."""
    return load(folder, device_map=MAP, offload_folder=tmp_path / "off")


def in_memory(folder: Path) -> Any:
    """The same model, nothing of it offloaded, with an adapter."""
    return shake(get_peft_model(load(folder), LoraConfig(**OPTIONS))).eval()


def check_places(model: Any) -> None:
    assert model.hf_device_map == MAP
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == ("layers.1." in name and "lora_" not in name), name


def check_same(model: Any, other: Any) -> None:
    """The same but for the order of sums: around an offloaded base PEFT adds up itself."""
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-6)


def test_a_new_adapter_has_numbers_and_learns(folder: Path, offloaded: Any) -> None:
    whole = in_memory(folder)
    model = shake(get_peft_model(offloaded, LoraConfig(**OPTIONS))).eval()
    check_places(model)
    check_same(model, whole)
    for one in (model, whole):
        one(IDS, labels=IDS).loss.backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert error(parameter.grad, wanted[name].grad) < 1e-4, name
    model.add_adapter("second", LoraConfig(**OPTIONS))
    check_places(model)
    base = model.unload()
    assert all(
        m.weight.is_meta
        for n, m in base.named_modules()
        if isinstance(m, Linear4bit) and ".1." in n
    )
    with torch.no_grad():
        assert (base(IDS).logits - logits(whole)).abs().max() > 0.01


@pytest.mark.parametrize("low", [False, True])
def test_a_saved_adapter_is_loaded(folder: Path, offloaded: Any, tmp_path: Path, low: bool) -> None:
    whole = in_memory(folder)
    whole.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(offloaded, tmp_path / "adapter", low_cpu_mem_usage=low)
    check_places(model)
    check_same(model, whole)
    model.load_adapter(tmp_path / "adapter", "again", low_cpu_mem_usage=low)
    model.set_adapter("again")
    check_places(model)
    check_same(model, whole)


def test_transformers_own_methods(folder: Path, offloaded: Any, tmp_path: Path) -> None:
    whole = in_memory(folder)
    whole.save_pretrained(tmp_path / "adapter")
    offloaded.load_adapter(str(tmp_path / "adapter"))
    check_places(offloaded)
    check_same(offloaded, whole)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "mica"}, {"use_dora": True}]
)
def test_what_needs_the_weight_is_refused(offloaded: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs the weight of model\.layers\.1.* offloads"):
        get_peft_model(offloaded, LoraConfig(**OPTIONS, **options))
    assert not any("lora_" in name for name, _ in offloaded.named_parameters())


def test_merging_is_refused_before_a_layer_is_merged(offloaded: Any) -> None:
    model = shake(get_peft_model(offloaded, LoraConfig(**OPTIONS))).eval()
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"layers\.1\..*: is offloaded by accelerate"):
            merge()
    assert torch.equal(logits(model), before)


def test_other_tuners_are_placed_too(offloaded: Any) -> None:
    config = peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
    model = get_peft_model(offloaded, config)
    assert not any(p.is_meta for n, p in model.named_parameters() if "ia3" in n)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
