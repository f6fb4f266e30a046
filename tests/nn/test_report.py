"""What of a model stays dense is said once, by name and bytes; a surprise is a warning."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qkern import nn as qnn


class Experts(nn.Module):
    """Two matrices an expert, stacked, in a module that does not say how it computes with them."""

    def __init__(self, count: int = 4, width: int = 64) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * width, width) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(count, width, width) * 0.1)
        self.gate = nn.Parameter(torch.randn(count))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.experts = Experts()


class Model(nn.Module):
    def __init__(self, experts: bool = True, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        kind = Layer if experts else (lambda: nn.Linear(64, 64))
        self.layers = nn.ModuleList(kind() for _ in range(layers))
        self.lm_head = nn.Linear(64, 100, bias=False)
        self.lm_head.weight = self.embed.weight


def test_weights_of_all_layers_are_one_line() -> None:
    model = Model()
    dense_bytes = sum(p.numel() * 4 for p in model.parameters())
    qnn.quantize_model(model)
    report = qnn.quantization_report(model)
    assert [w.name for w in report.dense] == [
        "layers.*.experts.gate_up_proj",
        "layers.*.experts.down_proj",
        "embed.weight",
    ]
    first, _, table = report.dense
    assert first.names == tuple(f"layers.{i}.experts.gate_up_proj" for i in range(3))
    assert (first.shape, first.dtype, first.expected) == ((4, 128, 64), torch.float32, False)
    assert first.nbytes == 3 * 4 * 128 * 64 * 4
    assert table.expected
    assert report.quantized_elements == 3 * 64 * 64
    assert report.nbytes == dense_bytes - 3 * 64 * 64 * 4 + report.quantized_nbytes
    weights = [m.quantized for m in model.modules() if isinstance(m, qnn.Linear4bit)]
    held = sum(t.nbytes for w in weights for t in w.weight.tensors if t is not None)
    meta = sum(p.numel() for n, p in model.named_parameters() if n.endswith("quant_meta"))
    assert report.quantized_nbytes == held + meta
    text = str(report)
    assert "layers.*.experts.gate_up_proj (3 x [4, 128, 64] float32, 393 kB)" in text
    assert f"{report.quantized_nbytes / report.quantized_elements:.3f} bytes a weight" in text


def test_share_and_kinds() -> None:
    model = nn.ModuleDict({"big": nn.Conv1d(64, 64, 3), "small": nn.Linear(16, 16)})
    model["small"].register_buffer("table", torch.zeros(16, 16))

    def names(share: float) -> list[str]:
        return [w.name for w in qnn.quantization_report(model, share).dense]

    assert names(0.01) == ["big.weight", "small.weight"]
    assert names(0.5) == ["big.weight"]
    assert names(1.0) == []
    model["narrow"] = nn.Linear(2, 2).half()
    model["list"] = nn.ParameterList([torch.zeros(1, 3), torch.zeros(1, 3)])
    assert names(0.0) == ["big.weight", "small.weight", "list.*", "narrow.weight"]
    report = qnn.quantization_report(model)
    assert (report.quantized_nbytes, report.quantized_elements) == (0, 0)
    assert report.nbytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with pytest.raises(TypeError, match="model: got SimpleNamespace; takes"):
        qnn.quantization_report(SimpleNamespace())
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"share: got {share}; takes a number from 0 to 1"):
            qnn.quantization_report(model, share)


def test_adapters_are_no_dense_weights_and_shared_ones_count_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    qnn.quantize_model(model, lora=qnn.LoRAConfig(16))
    report = qnn.quantization_report(model)
    assert report.dense == ()
    assert report.quantized_elements == 64 * 64
    assert report.nbytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert "dense" not in str(report)


def said(caplog: pytest.LogCaptureFixture, model: nn.Module, **options: object) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "qkern.nn"):
        qnn.quantize_model(model, **options)
    records = [r for r in caplog.records if r.name == "qkern.nn"]
    return [f"{r.levelname}: {r.getMessage()}" for r in records]


def test_tensors_that_nobody_knows_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(caplog, Model())
    assert line.startswith(
        "WARNING: Weights stay dense beside embeddings, heads, convolutions and routers: "
    )
    assert "layers.*.experts.gate_up_proj (3 x [4, 128, 64] float32, 393 kB)" in line
    (line,) = said(caplog, Model(), skip=["experts"])
    assert line.startswith("INFO: ")
    (line,) = said(caplog, Model(experts=False), lora=qnn.LoRAConfig(8))
    assert line.startswith("INFO: ")
    assert "embed.weight ([100, 64] float32, 25.6 kB)" in line
    assert "lora" not in line


class TopKRouter(nn.Module):
    """By name a router of experts, as those of transformers, whose weight is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))


def test_routers_are_known_to_stay_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"gate": TopKRouter(), "proj": nn.Linear(64, 64)})
    (line,) = said(caplog, model)
    assert line.startswith("INFO: ")
    (weights,) = qnn.quantization_report(model).dense
    assert (weights.name, weights.expected) == ("gate.weight", True)
    model["other"] = nn.ParameterList([torch.randn(64, 64)])
    (line,) = said(caplog, nn.ModuleDict({"gate": model["other"], "proj": nn.Linear(64, 64)}))
    assert line.startswith("WARNING: ")


def test_the_report_is_returned_and_is_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    with caplog.at_level(logging.INFO, "qkern.nn"):
        found = qnn.quantize_model(model, return_report=True)
    assert isinstance(found, tuple)
    assert found[0] is model
    assert found[1] == qnn.quantization_report(model)
    assert str(found[1]) in caplog.text
    caplog.clear()
    # Of weights alone: adapters come after it.
    model, report = qnn.quantize_model(
        Model(), targets=["proj"], lora=qnn.LoRAConfig(4), return_report=True
    )
    assert caplog.text == ""
    assert report.quantized_elements == 3 * 64 * 64
    assert qnn.quantization_report(model).nbytes > report.nbytes
    assert qnn.quantize_model(Model(), return_report=False).embed


def test_biases_of_experts_are_no_weights() -> None:
    model = Model()
    for layer in model.layers:
        layer.experts.gate_up_proj_bias = nn.Parameter(torch.randn(4, 128))
    names = [w.name for w in qnn.quantization_report(model, share=0.0).dense]
    assert "layers.*.experts.gate_up_proj" in names
    assert not any(name.endswith("_bias") for name in names)


def test_who_names_targets_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, Model(), targets=["proj"]) == []
