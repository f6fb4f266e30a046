"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qkern
from tests.models import tiny_llama

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own_module, whole_model, optimizers, hugging_face = re.findall(
        r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(compile(own_module, "README.md", "exec"), names)
    layer = names["MyLinear"](torch.randn(96, 128))
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), x @ layer.weight.dequantize().T)
    torch.testing.assert_close(x.grad, layer.weight.dequantize().sum(0).expand(3, 128))
    assert layer.b.grad.count_nonzero() == layer.b.numel()

    names["model"] = tiny_llama(num_hidden_layers=1)
    exec(compile(whole_model, "README.md", "exec"), names)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }

    names["parameters"] = list(qkern.nn.lora_parameters(names["model"]))
    exec(compile(optimizers, "README.md", "exec"), names)
    assert (tmp_path / "adamw.state").exists()
    names["parameters"][0].grad = torch.ones_like(names["parameters"][0])
    names["optimizer"].step()
    names["optimizer"].close()

    names["model"] = tiny_llama(num_hidden_layers=1)
    names["model"].save_pretrained("dense")
    names["path"] = "dense"
    exec(compile(hugging_face, "README.md", "exec"), names)
    layers = [m for m in names["model"].modules() if isinstance(m, qkern.nn.Linear4bit)]
    assert len(layers) == 7
    ids = torch.arange(8)[None]
    names["model"](input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in names["model"].parameters() if p.requires_grad]
    assert len(trained) == 14
    assert all(p.grad is not None for p in trained)
