"""Directories in 4 bits that do not fit the model, or contradict themselves, are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForSequenceClassification

from qkern import nn as qnn
from qkern.integrations.transformers import QKernConfig
from tests.integrations.architectures import SMALL
from tests.integrations.models_of_transformers import (
    IDS,
    changed,
    load,
    logits,
    saved_llama,
    tensors,
)

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
Change = Callable[[dict[str, Any]], Any]
Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Directories in 4 bits, one of each kind."""
    found: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = str(options)
        if key not in found:
            folder = tmp_path_factory.mktemp("saved")
            load(saved_llama(folder / "dense"), QKernConfig(**options)).save_pretrained(
                folder / "q"
            )
            found[key] = folder / "q"
        return found[key]

    return make


@pytest.fixture
def saved(made: Saved, tmp_path: Path) -> Saved:
    """A directory in 4 bits, for this test to change."""
    return lambda **options: shutil.copytree(made(**options), tmp_path / "q")


def without(*names: str) -> Change:
    return lambda held: [held.pop(name) for name in names]


def state(**fields: Any) -> Change:
    def change(held: dict[str, Any]) -> None:
        found = json.loads(bytes(held[STATE].tolist())) | fields
        held[STATE] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def more(name: str, size: int) -> Change:
    return lambda held: held.update({name: torch.ones(size)})


NORM = "model.layers.1.input_layernorm.weight"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
ALL = [NAME, STATE, *(f"{NAME}.{part}" for part in PARTS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{NAME}.absmax"), "weight.absmax: is missing"),
        (without(f"{NAME}.quant_map"), "quant_map: is missing"),
        (without(f"{NAME}.nested_absmax"), "nested_absmax: is missing"),
        (without(NAME), "weight: is missing"),
        (without(STATE), "takes one of"),
        (without(*ALL), "has no model.layers.0.mlp.up_proj"),
        (lambda held: held.update({STATE.replace("nf4", "fp4"): held[STATE]}), "takes one of"),
        (lambda held: held.update({f"{NAME}.quant_more": held[STATE]}), "quant_more"),
        (state(shape=[64, 96]), "got shape"),
        (state(blocksize=128), "absmax"),
        (state(quant_type="fp4"), "quant_type"),
        (lambda held: held.update({NAME: held[NAME][:-1]}), "packed: got shape"),
        (lambda held: held[f"{NAME}.quant_map"].add_(0.1), "quant_map"),
        (
            lambda held: held.update(
                {k.replace("layers.0", "layers.7"): v.clone() for k, v in held.items()}
            ),
            "has no 4-bit layer for model.layers.7",
        ),
        (without(NORM), f"has no {NORM}"),
        (without("model.embed_tokens.weight"), "has no model.embed_tokens.weight"),
        (more(NAME.replace(".weight", ".bias"), 96), r"4-bit layers .* no .*up_proj\.bias"),
        (more(NORM.replace(".weight", ".bias"), 64), "model has no .*layernorm.bias"),
        (more("model.layers.0.self_attn.q_norm.weight", 16), "model has no .*q_norm.weight"),
    ],
    ids=[
        "no-absmax",
        "no-map",
        "no-nested",
        "no-codes",
        "no-state",
        "nothing",
        "two-states",
        "unknown-part",
        "shape",
        "block-size",
        "type",
        "short",
        "map",
        "more-layers",
        "no-norm",
        "no-table",
        "bias",
        "bias-of-a-norm",
        "another-norm",
    ],
)
def test_what_does_not_fit_raises(saved: Saved, change: Change, message: str) -> None:
    folder = saved()
    with changed(folder) as held:
        change(held)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.0.mlp.up_proj.absmax"), "has no model.layers.0.mlp.up_proj.absmax"),
        (without("model.embed_tokens.weight"), "has no model.embed_tokens.weight"),
        (
            lambda held: held.update(
                {NAME: torch.zeros(4, 1, dtype=torch.uint8)},
            ),
            # Of transformers' loading since 5.21, else of the module.
            f"^{NAME}: got shape \\[4, 1\\]|^weight: got torch.uint8 \\[4, 1\\]",
        ),
        (
            lambda held: held.update(
                {
                    "model.layers.0.mlp.up_proj.quant_meta": torch.tensor(
                        list(
                            bytes(held["model.layers.0.mlp.up_proj.quant_meta"].tolist()).replace(
                                b"nf4", b"fp4"
                            )
                        ),
                        dtype=torch.uint8,
                    )
                }
            ),
            "'format': 'fp4'",
        ),
        (
            lambda held: held.update(
                {k.replace("layers.0", "layers.7"): v.clone() for k, v in held.items()}
            ),
            "has no 4-bit layer for model.layers.7",
        ),
    ],
    ids=["no-scales", "no-table", "short", "format", "more-layers"],
)
def test_the_own_layout_is_as_strict(saved: Saved, change: Change, message: str) -> None:
    folder = saved(quantize_embeddings=True)
    with changed(folder) as held:
        change(held)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_values_that_cannot_be_quantised_are_named(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path, shard="1GB")
    with changed(folder) as held:
        held[NAME][3, 5] = torch.nan
    with pytest.raises(ValueError, match=f"^{NAME}: .*NaN"):
        load(folder)


def test_a_wrong_shape_of_a_dense_weight_is_named(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path, shard="1GB")
    with changed(folder) as held:
        held[NAME] = held[NAME][:, :-1].contiguous()
    with pytest.raises(ValueError, match=f"^{NAME}: got shape \\[96, 63\\]; takes \\[96, 64\\]"):
        load(folder)


def test_the_tensors_say_what_is_in_4_bits_not_the_config(saved: Saved) -> None:
    folder = saved(skip=["up_proj"])
    model = load(folder)
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "down_proj"]
    fields["quantization_config"]["bnb_4bit_use_double_quant"] = False
    file.write_text(json.dumps(fields))
    found = load(folder)
    assert type(found.get_submodule(NAME.removesuffix(".weight"))) is torch.nn.Linear
    assert isinstance(found.model.layers[1].mlp.down_proj, qnn.Linear4bit)
    assert torch.equal(logits(found), logits(model))


def test_a_base_model_and_a_new_head_load_as_ever(saved: Saved) -> None:
    folder = saved()
    base = load(folder, kind=AutoModel)
    assert isinstance(base.layers[0].mlp.up_proj, qnn.Linear4bit)
    task = load(folder, kind=AutoModelForSequenceClassification)
    assert type(task.score) is torch.nn.Linear
    assert task.score.weight.isfinite().all()
    assert torch.equal(
        task.model.layers[0].mlp.up_proj.quantized.packed,
        base.layers[0].mlp.up_proj.quantized.packed,
    )


def test_a_base_model_is_as_strict_and_passes_over_heads_and_masks(saved: Saved) -> None:
    folder = saved()
    with changed(folder) as held:
        held["model.layers.0.self_attn.mask"] = torch.ones(4)
        held["more_head.weight"] = torch.ones(4, 64)
    base = load(folder, kind=AutoModel)
    assert torch.equal(base(IDS).last_hidden_state, load(folder).model(IDS).last_hidden_state)
    with changed(folder) as held:
        held.pop(NORM)
    with pytest.raises(ValueError, match=r"has no layers\.1\.input_layernorm\.weight"):
        load(folder, kind=AutoModel)


def test_new_layers_stay_dense_where_they_are_skipped(tmp_path: Path) -> None:
    mlm, task = transformers.BertForMaskedLM, transformers.BertForSequenceClassification
    torch.manual_seed(0)
    mlm(transformers.BertConfig(**SMALL | {"vocab_size": 128})).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"no bert\.pooler\.dense.*; name the modules in .*skip"):
        load(tmp_path / "dense", kind=task)
    model = load(tmp_path / "dense", QKernConfig(skip=["pooler"]), kind=task)
    assert type(model.bert.pooler.dense) is torch.nn.Linear
    model.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q", kind=task)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["qkern", "bitsandbytes"])
def test_a_directory_in_4_bits_may_lack_what_is_skipped(tmp_path: Path, method: str) -> None:
    """As a pooler, of a model that was saved without; but no other tensor of the base model."""
    mlm, task = transformers.BertForMaskedLM, transformers.BertForSequenceClassification
    torch.manual_seed(0)
    mlm(transformers.BertConfig(**SMALL | {"vocab_size": 128})).save_pretrained(tmp_path / "dense")
    options = {"quantize_embeddings": method == "qkern"}
    load(tmp_path / "dense", QKernConfig(**options), kind=mlm).save_pretrained(tmp_path / "q")
    with pytest.raises(ValueError, match=r"no bert\.pooler\.dense.*; name the modules in .*skip"):
        load(tmp_path / "q", QKernConfig(**options), kind=task)
    config = QKernConfig(skip=["pooler"], **options)
    model = load(tmp_path / "q", config, kind=task)
    assert config.skip == ["pooler"]
    assert type(model.bert.pooler.dense) is torch.nn.Linear
    assert model.bert.pooler.dense.weight.isfinite().all()
    assert isinstance(model.bert.encoder.layer[1].output.dense, qnn.Linear4bit)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", kind=task)
    assert torch.equal(logits(again), logits(model))
    held_in_4_bits = {
        "qkern": r"no 4-bit layer for bert\.encoder\.layer\.1\.output\.dense",
        "bitsandbytes": r"skip: got 'layer.1.output'; the checkpoint has bert.*dense in 4 bits",
    }
    with pytest.raises(ValueError, match=held_in_4_bits[method]):
        load(tmp_path / "q", QKernConfig(skip=["pooler", "layer.1.output"], **options), kind=task)
    with changed(tmp_path / "q") as held:
        # BERT's files have had two names of it.
        held.pop(next(name for name in held if "layer.1.output.LayerNorm." in name))
    with pytest.raises(ValueError, match=r"has no bert\.encoder\.layer\.1\.output\.LayerNorm"):
        load(tmp_path / "q", QKernConfig(skip=["pooler", "LayerNorm"], **options), kind=task)


def test_a_lost_shard_raises(tmp_path: Path) -> None:
    load(saved_llama(tmp_path / "dense")).save_pretrained(tmp_path / "q", max_shard_size="30KB")
    file = tmp_path / "q" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    whole = index["weight_map"]
    shards = sorted(set(whole.values()))
    assert len(shards) > 2
    for lost in shards:
        index["weight_map"] = {name: shard for name, shard in whole.items() if shard != lost}
        file.write_text(json.dumps(index))
        if any(name.startswith("model.") for name in whole.keys() - index["weight_map"].keys()):
            with pytest.raises(ValueError, match=r"the checkpoint has no|is missing"):
                load(tmp_path / "q")


@pytest.mark.parametrize("method", ["qkern", "bitsandbytes"])
def test_sizes_that_differ_raise_for_4_bit_weights_even_where_they_are_ignored(
    saved: Saved, method: str
) -> None:
    folder = saved(quantize_embeddings=method == "qkern")
    with pytest.raises(ValueError, match=r"down_proj.*: got shape|^absmax: got .*\[96\]"):
        load(folder, intermediate_size=128, ignore_mismatched_sizes=True)
    for layers, message in ((3, "checkpoint has no model.layers.2"), (1, "model.layers.1")):
        with pytest.raises(ValueError, match=message):
            load(folder, num_hidden_layers=layers, ignore_mismatched_sizes=True)


def test_8_bit_directories_are_bitsandbytes(saved: Saved) -> None:
    folder = saved()
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"] |= {"load_in_4bit": False, "_load_in_4bit": False}
    fields["quantization_config"] |= {"load_in_8bit": True, "_load_in_8bit": True}
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        load(folder)


def test_other_settings_than_the_directory_has_are_told(
    saved: Saved, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved()
    transformers.utils.logging.enable_propagation()
    try:
        load(folder)
        assert "in 4 bits already" not in caplog.text
        load(folder, QKernConfig("fp4", double_quant=False))
    finally:
        transformers.utils.logging.disable_propagation()
    assert "its own format, double_quant count" in caplog.text


def test_odd_subclasses_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    class Odd(torch.nn.Linear):
        pass

    class WithOdd(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers[0].mlp.up_proj = Odd(64, 96, bias=False)

    folder = saved_llama(tmp_path)
    with pytest.raises(TypeError, match=r"up_proj is a Odd; takes exactly nn\.Linear"):
        load(folder, kind=WithOdd)
    model = load(folder, QKernConfig(skip=["layers.0.mlp.up_proj"]), kind=WithOdd)
    assert type(model.model.layers[0].mlp.up_proj) is Odd


def test_nothing_of_it_is_left_in_a_model(saved: Saved) -> None:
    folder = saved()
    model = load(folder)
    assert "_adjust_missing_and_unexpected_keys" not in vars(model)
    assert tensors(folder).keys() == model.hf_quantizer.get_state_dict_and_metadata(model)[0].keys()
