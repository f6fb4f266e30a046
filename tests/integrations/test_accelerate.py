"""FSDP by accelerate on CPUs: what is asked for is used, and what cannot be is refused.

Larger programs are launched in ``test_distributed.py``.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from qkern import nn as qnn
from qkern import testing
from qkern.integrations import _launch
from qkern.integrations.accelerate import enable_fsdp_on_cpu
from tests.integrations import launched, launched_small
from tests.integrations.launching import FSDP2, launch
from tests.integrations.models_of_transformers import IDS, load
from tests.models import tiny_llama


class Plugin(SimpleNamespace):
    """What is asked of accelerate's."""

    def set_mixed_precision(self, dtype: str) -> None:
        self.dtype = dtype


@pytest.fixture
def as_in_processes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """accelerate's state, as it is where processes run on CPUs, without any; the shared one."""
    shared: dict[str, Any] = {}

    def init(self: Any, mixed_precision: str = "no", fsdp_plugin: Any = None, **_: Any) -> None:
        self.__dict__ = shared
        self.distributed_type = PartialState._shared_state["distributed_type"]
        self._mixed_precision = mixed_precision

    monkeypatch.setattr(AcceleratorState, "__init__", init)
    monkeypatch.setattr(AcceleratorState, "_shared_state", shared)
    partial = {"distributed_type": DistributedType.MULTI_CPU}
    monkeypatch.setattr(PartialState, "_shared_state", partial)
    return shared


def test_a_plugin_is_used_on_cpus(as_in_processes: dict[str, Any]) -> None:
    plugin = Plugin(fsdp_version=2)
    before = AcceleratorState(fsdp_plugin=plugin)
    assert before.distributed_type == DistributedType.MULTI_CPU  # accelerate itself ignores it
    enable_fsdp_on_cpu()
    enable_fsdp_on_cpu()
    state = AcceleratorState(fsdp_plugin=plugin, mixed_precision="bf16")
    assert state.distributed_type == DistributedType.FSDP
    assert state.is_fsdp2
    assert state.fsdp_plugin is plugin
    assert plugin.dtype == "bf16"
    again = AcceleratorState()  # as accelerate's optimizers ask
    assert again.distributed_type == DistributedType.FSDP


def test_nothing_changes_without_a_plugin_and_elsewhere(as_in_processes: dict[str, Any]) -> None:
    enable_fsdp_on_cpu()
    assert AcceleratorState().distributed_type == DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    state = AcceleratorState(fsdp_plugin=Plugin(fsdp_version=1))
    assert state.distributed_type == DistributedType.MULTI_GPU


def test_fsdp1_is_refused_on_cpus(as_in_processes: dict[str, Any]) -> None:
    enable_fsdp_on_cpu()
    with pytest.raises(ValueError, match="fsdp_version: got 1; takes 2"):
        AcceleratorState(fsdp_plugin=Plugin(fsdp_version=1))
    assert not as_in_processes  # the next one may have another plugin


def test_it_must_come_before_the_first_accelerator(
    as_in_processes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState()
    enable_fsdp_on_cpu()  # DDP was asked for
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(
        AcceleratorState, "_shared_state", {"distributed_type": DistributedType.MULTI_CPU}
    )
    with pytest.raises(RuntimeError, match="before the first Accelerator"):
        enable_fsdp_on_cpu()


@pytest.mark.parametrize("known", [True, False], ids=["accelerate", "no_accelerate"])
def test_fsdp1_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    if not known:
        monkeypatch.delitem(sys.modules, "accelerate.state")
    _launch.refuse_fsdp1()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    _launch.refuse_fsdp1()  # a plugin of the program, not made yet
    for version in (2, 1):
        monkeypatch.setenv("FSDP_VERSION", str(version))
        if version == 2:
            _launch.refuse_fsdp1()
            continue
        with pytest.raises(ValueError, match="fsdp_version: got 1; 4-bit weights take 2"):
            _launch.refuse_fsdp1()
    if known:
        AcceleratorState._shared_state["fsdp_plugin"] = Plugin(fsdp_version=2)
        _launch.refuse_fsdp1()
        monkeypatch.setenv("FSDP_VERSION", "2")
        AcceleratorState._shared_state["fsdp_plugin"] = Plugin(fsdp_version=1)
        with pytest.raises(ValueError, match="fsdp_version: got 1"):
            _launch.refuse_fsdp1()


@pytest.mark.slow
def test_accelerate_launch_shards_4_bit_layers(tmp_path: Path) -> None:
    config = copy.deepcopy(FSDP2)
    config["fsdp_config"]["fsdp_auto_wrap_policy"] = "NO_WRAP"  # the model is no transformer
    program = "tests.integrations.launched_small"
    launch(config, 2, program, str(tmp_path), folder=tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = launched_small.make_model()
        optimizer = torch.optim.SGD(qnn.lora_parameters(model), lr=0.1)
        for x in launched_small.inputs():
            (model(x).square().mean() / 2).backward()
        optimizer.step()
    finally:
        torch.set_num_threads(threads)
    expected = model.state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["fsdp2"]
        assert found["held"] == 64 * 96 // 4
        assert found["state"].keys() == expected.keys()
        for name, tensor in expected.items():
            testing.assert_bitwise(found["state"][name], tensor, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    return folder


def test_from_pretrained_refuses_fsdp1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version: got 1; 4-bit weights take 2"):
        load(folder)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert isinstance(load(folder).model.layers[0].mlp.up_proj, qnn.Linear4bit)


def test_a_model_on_a_device_map_trains_without_bitsandbytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "is_bitsandbytes_multi_backend_available", lambda: False)
    model = launched.adapted(load(folder, device_map={"": "cpu"}))
    try:
        prepared = Accelerator(cpu=True).prepare_model(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    prepared(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
