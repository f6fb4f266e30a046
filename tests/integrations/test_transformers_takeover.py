"""`take_over_bitsandbytes`: a script written for bitsandbytes runs on qkern as it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lab.processes import environment
from qkern import nn as qnn
from qkern.integrations.transformers import give_back_bitsandbytes, take_over_bitsandbytes
from tests.integrations.models_of_transformers import (
    assert_same_files,
    logits,
    saved_llama,
    tensors,
)

OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["q_proj", "model.layers.1"]},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    ],
    ids=["defaults", "nested", "compute-dtype", "skip", "storage"],
)


@pytest.fixture
def taken_over() -> Iterator[None]:
    take_over_bitsandbytes()
    take_over_bitsandbytes()
    yield
    give_back_bitsandbytes()
    give_back_bitsandbytes()


def load(folder: Path, **options: Any) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@OPTIONS
def test_the_same_layers_codes_and_files(tmp_path: Path, options: dict[str, Any]) -> None:
    dense = saved_llama(tmp_path / "dense")
    theirs = load(dense, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    take_over_bitsandbytes()
    try:
        own = load(dense, **options)
        assert own.quantization_method == theirs.quantization_method
        own.save_pretrained(tmp_path / "own")
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        read.save_pretrained(tmp_path / "read")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "read")
        again.save_pretrained(tmp_path / "again")
    finally:
        give_back_bitsandbytes()
    layers = [n for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    for model in (own, read):
        assert [n for n, m in model.named_modules() if isinstance(m, qnn.Linear4bit)] == layers
        dtype = options.get("bnb_4bit_compute_dtype", torch.float32)
        assert all(model.get_submodule(name).compute_dtype is dtype for name in layers)
    written, expected = tensors(tmp_path / "own"), tensors(tmp_path / "theirs")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        # JSON has the decimals of the offset.
        assert written[name].shape == tensor.shape or "quant_state" in name
    for name in layers:
        weight = theirs.get_submodule(name).weight
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(read.get_submodule(name).quantized.dequantize(), values)
        # bitsandbytes rounds what lies between two codes otherwise.
        differing = own.get_submodule(name).quantized.dequantize() - values
        assert (differing.abs() > 1e-4).float().mean() < 2e-3
    assert_same_files(tmp_path / "read", tmp_path / "again")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert isinstance(back.get_submodule(layers[0]), bnb.nn.Linear4bit)
    torch.testing.assert_close(logits(back), logits(own), rtol=0.05, atol=0.05)


def test_it_ends_when_it_is_given_back(tmp_path: Path, taken_over: None) -> None:
    folder = saved_llama(tmp_path)
    assert isinstance(load(folder).model.layers[0].mlp.up_proj, qnn.Linear4bit)
    give_back_bitsandbytes()
    assert isinstance(load(folder).model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("bnb_4bit_quant_type", "af4", ValueError),
        ("bnb_4bit_compute_dtype", torch.float64, TypeError),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, taken_over: None, option: str, value: object, error: type[Exception]
) -> None:
    folder = saved_llama(tmp_path)
    with pytest.raises(error, match=f"^{option}: got"):
        load(folder, **{option: value})


def test_storage_that_does_not_divide_a_weight_is_refused_on_loading(
    tmp_path: Path, taken_over: None
) -> None:
    folder = saved_llama(tmp_path, intermediate_size=33, hidden_size=36, num_attention_heads=2)
    with pytest.raises(
        ValueError,
        match=r"^bnb_4bit_quant_storage: got torch\.float32; "
        r"model\.layers\.0\.mlp\.gate_proj\.weight has 594 bytes",
    ):
        load(folder, bnb_4bit_quant_storage=torch.float32)
    load(folder, bnb_4bit_quant_storage=torch.bfloat16).save_pretrained(tmp_path / "q")


def test_modules_off_the_gpu_stay_dense_where_asked(tmp_path: Path, taken_over: None) -> None:
    folder = saved_llama(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_enable_fp32_cpu_offload=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    )
    assert not any(isinstance(m, qnn.Linear4bit) for m in model.modules())


SCRIPT = """
import importlib.machinery, sys

class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hidden
try:
    import bitsandbytes
except ImportError:
    pass
else:
    raise SystemExit("bitsandbytes is there")

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from qkern.integrations.transformers import QKernConfig, take_over_bitsandbytes

folder, out = sys.argv[1:]
take_over_bitsandbytes()
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
count = model.num_parameters()
model.save_pretrained(out, max_shard_size="20KB")
again = AutoModelForCausalLM.from_pretrained(out)
other = AutoModelForCausalLM.from_pretrained(out, quantization_config=QKernConfig())
assert again.num_parameters() == other.num_parameters() == count
ids = torch.arange(8)[None]
with torch.no_grad():
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert torch.equal(model(ids).logits, other(ids).logits)
peft = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(target_modules=["q_proj"]))
peft(ids, labels=ids).loss.backward()
assert any(p.grad is not None and p.grad.any() for p in peft.parameters())
assert "bitsandbytes" not in sys.modules
print("done", count)
"""


@pytest.mark.slow
def test_it_runs_without_bitsandbytes(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(folder)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-2:] == ["done", str(dense.num_parameters())]
