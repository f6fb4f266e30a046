"""Mixtures of experts by transformers' loading, saving and generating, and PEFT's files of them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkern
from qkern import io
from qkern import nn as qnn
from tests.experts_of_models import IDS, MODELS, eager, experts_of, experts_path, quantised
from tests.experts_of_models import dense as mixture
from tests.integrations.models_of_transformers import tensors

transformers = pytest.importorskip("transformers")
from qkern.integrations.transformers import QKernConfig  # noqa: E402

families = pytest.mark.parametrize("name", MODELS)
OPTIONS: dict[str, Any] = {"block_size": 32}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def loaded(model: Any, folder: Path, **options: Any) -> Any:
    """The model in ``folder``, whose class is that of ``model``."""
    return type(model).from_pretrained(folder, local_files_only=True, **options)


@families
def test_a_checkpoint_is_quantised_and_written_and_read_again(name: str, tmp_path: Path) -> None:
    """As the model in memory is, bit for bit; and what is dense again has transformers' names."""
    dense = mixture(name)
    dense.save_pretrained(tmp_path / "dense")
    config = QKernConfig(**OPTIONS)
    model = loaded(dense, tmp_path / "dense", quantization_config=config)
    twin = qnn.quantize_model(copy.deepcopy(dense), **OPTIONS)
    found, expected = model.state_dict(), twin.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert len(experts_of(model)) == len(experts_of(twin)) > 0
    assert torch.equal(logits(model), logits(twin))

    model.save_pretrained(tmp_path / "one")
    keys = [k for k in tensors(tmp_path / "one") if k.endswith(".experts.down_proj.quant_meta")]
    assert len(keys) == len(experts_of(model)) // 2
    again = loaded(dense, tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    assert again.state_dict().keys() == found.keys()

    whole = again.dequantize()
    assert not experts_of(whole)
    assert (logits(whole) - logits(model)).abs().max() < 1e-5
    whole.save_pretrained(tmp_path / "whole")
    assert tensors(tmp_path / "whole").keys() == tensors(tmp_path / "dense").keys()
    assert torch.equal(logits(loaded(dense, tmp_path / "whole")), logits(whole))


def test_only_one_expert_is_dense_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is read when the one before is in 4 bits: no tensor of several is ever made."""
    dense = mixture()
    dense.save_pretrained(tmp_path)
    before = torch.stack
    sizes: list[int] = []

    def stack(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        found = before(tensors, *args, **kwargs)
        sizes.append(len(tensors))
        return found

    monkeypatch.setattr(torch, "stack", stack)
    model = loaded(dense, tmp_path, quantization_config=QKernConfig(**OPTIONS))
    assert len(experts_of(model)) == 4
    assert sizes
    assert max(sizes) == 1


@pytest.mark.parametrize("change", ["fewer", "shape", "nan"])
def test_experts_that_do_not_fit_are_named(change: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = mixture()
    dense.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    found = load_file(file)
    key = next(k for k in found if k.endswith("experts.3.w2.weight"))
    if change == "fewer":
        found = {k: v for k, v in found.items() if ".experts.3." not in k}
    elif change == "shape":
        found[key] = found[key][:, :-1].contiguous()
    else:
        found[key][0, 0] = torch.nan
    save_file(found, file, metadata={"format": "pt"})
    takes = {
        "fewer": "got 3 experts; takes 4",
        "shape": r"got shape \[64, 95\]; takes \[64, 96\]",
        "nan": "expert 3: w: got a NaN or an infinity in block 0",
    }
    with pytest.raises((ValueError, RuntimeError), match=takes[change]):
        loaded(dense, tmp_path, quantization_config=QKernConfig(**OPTIONS))


def test_a_checkpoint_of_another_layout_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = quantised()
    state = model.state_dict()
    key = next(k for k in state if k.endswith("down_proj.quant_meta"))
    meta = json.loads(bytes(state[key].tolist()))
    assert meta["experts"] == 1
    newer = json.dumps({**meta, "experts": 2}, sort_keys=True).encode()
    state[key] = torch.tensor(list(newer), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"the checkpoint holds .*'experts': 2"):
        model.load_state_dict(state)
    dense = mixture()
    dense.save_pretrained(tmp_path / "dense")
    loaded(dense, tmp_path / "dense", quantization_config=QKernConfig(**OPTIONS)).save_pretrained(
        tmp_path / "one"
    )
    file = tmp_path / "one" / "model.safetensors"
    found = load_file(file)
    key = next(k for k in found if k.endswith("down_proj.quant_meta"))
    found[key] = torch.tensor(list(newer), dtype=torch.uint8)
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint holds .*'experts': 2"):
        loaded(dense, tmp_path / "one")


def test_named_experts_stay_dense_where_they_are_skipped(tmp_path: Path) -> None:
    """In one layer: its tensors are as ever, those of the other one are in 4 bits."""
    dense = mixture()
    dense.save_pretrained(tmp_path / "dense")
    config = QKernConfig(skip=["layers.0.mlp.experts"], **OPTIONS)
    model = loaded(dense, tmp_path / "dense", quantization_config=config)
    assert {name.split(".")[2] for name in experts_of(model)} == {"1"}
    original = dense.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, original)
    model.save_pretrained(tmp_path / "one")
    assert torch.equal(logits(loaded(dense, tmp_path / "one")), logits(model))


def peft_twin(dense: nn.Module, targets: list[str]) -> Any:
    """PEFT's model on the dense experts, with adapters that compute something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of untrained routers
        model = peft.get_peft_model(copy.deepcopy(dense), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize(
    "parts", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=["both", "one"]
)
def test_files_of_peft_with_adapters_on_experts(
    name: str, parts: list[str], tmp_path: Path
) -> None:
    """They are read, and written so that PEFT reads them, with the same results."""
    peft = pytest.importorskip("peft")
    model = quantised(name)
    dense = eager(model)
    targets = [f"{experts_path(name)}.{part}" for part in parts]
    theirs = peft_twin(dense, targets)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = io.load_adapter(copy.deepcopy(model), tmp_path / "theirs").eval()
    assert sum(isinstance(m, qnn.LoRAExperts) for m in ours.modules()) == 2 * len(parts)
    expected = logits(theirs)
    assert (logits(ours) - expected).abs().max() < 1e-5 < (logits(model) - expected).abs().max()

    io.save_adapter(ours, tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert sorted(fields["target_parameters"]) == sorted(f"experts.{part}" for part in parts)
    found, written = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], written[key]) for key in found)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "ours").eval()
    assert torch.equal(logits(again), expected)
    io.load_adapter(ours, tmp_path / "ours")  # where it has adapters already


@pytest.mark.parametrize(
    "targets",
    [
        ["layers.0.mlp.experts.gate_up_proj"],
        ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
        ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj", "q_proj"],
    ],
)
def test_files_of_adapters_on_some_layers_experts(targets: list[str], tmp_path: Path) -> None:
    """Their names are whole ones, since their ends are those of others too."""
    peft = pytest.importorskip("peft")
    base = quantised()
    model = qnn.add_lora(copy.deepcopy(base), qnn.LoRAConfig(r=2, targets=targets))
    for parameter in qnn.lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    io.save_adapter(model, tmp_path)
    again = io.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again), logits(model))
    other = peft.PeftModel.from_pretrained(eager(base), tmp_path)
    assert (logits(other) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("skip", ["experts.down_proj", "experts.gate_up_proj"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_checkpoint_of_which_one_tensor_stays_dense(name: str, skip: str, tmp_path: Path) -> None:
    dense = mixture(name)
    dense.save_pretrained(tmp_path / "dense")
    config = QKernConfig(skip=[skip], **OPTIONS)
    model = loaded(dense, tmp_path / "dense", quantization_config=config)
    assert all(not path.endswith(skip) for path in experts_of(model))
    model.save_pretrained(tmp_path / "one")
    again = loaded(dense, tmp_path / "one")
    assert torch.equal(logits(again), logits(model))


def test_a_shared_adapter_is_written_for_each_expert(tmp_path: Path) -> None:
    model = quantised()
    config = qnn.LoRAConfig(r=2, share_experts=True, targets=["experts.down_proj"])
    shared = qnn.add_lora(copy.deepcopy(model), config)
    for parameter in qnn.lora_parameters(shared):
        torch.nn.init.normal_(parameter, std=0.1)
    io.save_adapter(shared, tmp_path)
    apart = io.load_adapter(copy.deepcopy(model), tmp_path)
    assert (logits(apart) - logits(shared)).abs().max() < 1e-6
    io.load_adapter(shared, tmp_path)
    for _, layer in qnn.lora_layers(apart):
        torch.nn.init.normal_(layer.lora_a)
    io.save_adapter(apart, tmp_path)
    with pytest.raises(ValueError, match="its experts share an adapter"):
        io.load_adapter(shared, tmp_path)


def test_wrong_files_of_adapters_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = quantised()
    adapted = qnn.add_lora(copy.deepcopy(model), qnn.LoRAConfig(r=2, targets=["experts.down_proj"]))
    io.save_adapter(adapted, tmp_path)
    dense = mixture()
    with pytest.raises(ValueError, match=r"target_parameters: got 'experts\.down_proj'; takes"):
        io.load_adapter(dense, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    found = load_file(file)
    key = next(k for k in found if k.endswith("lora_A.weight"))
    save_file(found | {key: found[key][:-1].contiguous()}, file)
    with pytest.raises(ValueError, match=r"takes \[4 \* r, in\] and \[out, r \* 4\], for 4 exp"):
        io.load_adapter(copy.deepcopy(model), tmp_path)
    config = qnn.LoRAConfig(r=2, dropout=0.1, targets=["experts.down_proj"])
    adapted = qnn.add_lora(copy.deepcopy(model), config)
    with pytest.warns(UserWarning, match="takes no dropout in adapters on experts"):
        io.save_adapter(adapted, tmp_path)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["parameters", "modules"],
)
def test_peft_is_told_that_it_has_no_adapters_for_experts_in_4_bits(
    targets: dict[str, Any], tmp_path: Path
) -> None:
    """A file of PEFT's for the dense model too, which `load_adapter` reads."""
    peft = pytest.importorskip("peft")
    from qkern.integrations import peft as ours

    ours.register()
    model = quantised()
    message = r"got .*experts.* in 4 bits; .* takes qkern\.nn\.add_lora or qkern\.io\.load_adapter"
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, peft.LoraConfig(r=4, **targets))
    if "target_parameters" in targets:
        peft_twin(mixture(), targets["target_parameters"]).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            peft.PeftModel.from_pretrained(quantised(), tmp_path)
        io.load_adapter(quantised(), tmp_path)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_keys_of_bitsandbytes_expert_by_expert(parts: int, double_quant: bool) -> None:
    """As frameworks had them that kept a list of experts; bitsandbytes reads each."""
    qw = qkern.quantize_experts(torch.randn(3, 64, 96), double_quant=double_quant)
    names: list[Any] = [f"experts.{e}.w2.weight" for e in range(3)]
    if parts == 2:
        names = [[f"experts.{e}.w1.weight", f"experts.{e}.w3.weight"] for e in range(3)]
    found = qw.to_bnb(names)
    again = qkern.QuantizedExperts.from_bnb(found, names)
    assert torch.equal(again.dequantize(), qw.dequantize())
    assert again.double_quant is (double_quant and parts == 1)
    functional = pytest.importorskip("bitsandbytes").functional
    flat = [n for each in names for n in ([each] if isinstance(each, str) else each)]
    for index, name in enumerate(flat):
        state = {k: v for k, v in found.items() if k.startswith(f"{name}.")}
        read = functional.QuantState.from_dict(state, torch.device("cpu"))
        values = functional.dequantize_4bit(found[name], read)
        rows = qw[index // parts].dequantize().chunk(parts)[index % parts]
        assert (values - rows).abs().max() <= 1e-6


def test_experts_in_one_tensor_are_in_no_file_of_bitsandbytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: bitsandbytes has no file layout"):
        io.save_bnb(quantised(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_bitsandbytes_keys_cannot_say_is_refused() -> None:
    qw = qkern.quantize_experts(torch.randn(2, 6, 32))
    with pytest.raises(ValueError, match="names: got those of 1 experts; takes 2"):
        qw.to_bnb(["one"])
    with pytest.raises(ValueError, match="a: got 96 elements in blocks of 64; takes whole blocks"):
        qw.to_bnb([["a", "b"], ["c", "d"]])
    with pytest.raises(ValueError, match="a: got 6 rows for 4 weights; takes a multiple"):
        qw.to_bnb([list("abcd"), list("efgh")])
    with pytest.raises(TypeError, match="names: got the string"):
        qw.to_bnb("ab")
    with pytest.raises(ValueError, match="names: got no name for an expert"):
        qw.to_bnb([[], []])
    wide = qkern.quantize_experts(torch.randn(2, 6, 64)).to_bnb(["a", "b"])
    small = qkern.quantize_experts(torch.randn(2, 6, 32), block_size=32).to_bnb(["c", "d"])
    with pytest.raises(ValueError, match="c: got block_size 32; takes 64, that of a"):
        qkern.QuantizedExperts.from_bnb(wide | small, [["a", "c"], ["b", "d"]])
