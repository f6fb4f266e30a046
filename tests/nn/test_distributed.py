"""4-bit weights under data and sharded parallelism, in two processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, load

from qkern import nn as qnn
from qkern import testing
from tests.nn import training
from tests.nn.training import DDP_MODES, MODES, QUANTISED
from tests.optim.processes import run_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_processes(training, "ddp", "none", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def fsdp(fsdp_folder: Path) -> Results:
    return run_processes(training, "fsdp", "none", fsdp_folder)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_processes(training, "fsdp_reload", "none", tmp_path_factory.mktemp("reload"))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        testing.assert_bitwise(found[name], tensor, name)


def codes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: t for name, t in state.items() if not t.is_floating_point()}
    assert {name.rpartition(".")[2] for name in found} == set(QUANTISED) - {"codebook"}
    return found


def trained_alone(mode: str) -> tuple[nn.Module, list[list[Tensor]]]:
    torch.set_num_threads(1)  # as each of the processes
    return training.train_alone(mode)


def test_ddp_trains_as_one_process(ddp: Results) -> None:
    net, losses = trained_alone("float32")
    for rank, result in enumerate(ddp):
        assert_same(result["state"], training.state(net))
        testing.assert_bitwise(torch.stack(result["losses"]), torch.stack(losses[rank]))


def test_ddp_trains_as_one_process_that_recomputes_nothing(tmp_path: Path) -> None:
    results = run_processes(training, "ddp_checkpointed", "none", tmp_path)
    net, losses = trained_alone("float32")
    for rank, result in enumerate(results):
        for mode in DDP_MODES:
            assert_same(result[mode]["state"], training.state(net))
            testing.assert_bitwise(torch.stack(result[mode]["losses"]), torch.stack(losses[rank]))


def test_ddp_leaves_the_weights_to_their_ranks(ddp: Results) -> None:
    """Buffers would be broadcast before each forward, and rank 1's weights be rank 0's."""
    for result in ddp:
        assert result["kept"]
        assert result["broadcasts"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_fsdp2_trains_as_one_process(fsdp: Results, mode: str) -> None:
    net, losses = trained_alone(mode)
    for rank, result in enumerate(fsdp):
        found = torch.stack(result[mode]["losses"])
        if mode != "float32-layers":
            testing.assert_bitwise(found, torch.stack(losses[rank]))
            assert_same(result[mode]["state"], training.state(net))
            continue
        # A base layer that is a unit of its own is called for itself, so x gets two gradients,
        # each rounded. The first loss is before any gradient.
        testing.assert_bitwise(found[0], losses[rank][0])
        torch.testing.assert_close(found, torch.stack(losses[rank]), rtol=1e-5, atol=0)
        assert_same(codes(result[mode]["state"]), codes(training.state(net)))


@pytest.mark.parametrize("mode", MODES)
def test_fsdp2_keeps_the_weights_of_every_forward(fsdp: Results, mode: str) -> None:
    """Also under a policy of bfloat16, which casts what is floating point."""
    net = training.model(mode)
    for result in fsdp:
        assert len(result[mode]["seen"]) == 4
        for name, weights in result[mode]["seen"].items():
            layer = net.get_submodule(name)
            assert isinstance(layer, qnn.Linear4bit)
            assert len(weights) >= training.STEPS
            for weight in weights:
                testing.assert_bitwise(weight, layer.quantized.dequantize(), name)


@pytest.mark.parametrize("mode", MODES)
def test_fsdp2_shards_the_packed_bytes(fsdp: Results, mode: str) -> None:
    names = set(codes(training.model(mode).state_dict()))
    for result in fsdp:
        assert set(result[mode]["bytes"]) == names
        for name, (here, whole) in result[mode]["bytes"].items():
            # Rows are shared out, the last one padded: a byte of codes, four of a scale.
            padding = 1 if name.endswith(("weight", "quant_meta")) else 4
            assert here <= (whole + 1) // 2 + padding, name
        packed = [size for name, size in result[mode]["bytes"].items() if name.endswith("weight")]
        assert sum(here for here, _ in packed) <= sum(whole for _, whole in packed) // 2 + 5
        assert result[mode]["refused"] == ("weight: is sharded; takes a module after its unshard()")


@pytest.mark.parametrize("mode", MODES)
def test_a_distributed_checkpoint_loads_into_one_process(
    fsdp: Results, fsdp_folder: Path, mode: str
) -> None:
    net = training.model(mode)
    state = net.state_dict()
    load(state, storage_reader=FileSystemReader(fsdp_folder / mode), no_dist=True)
    net.load_state_dict(state)
    assert_same(net.state_dict(), fsdp[0][mode]["state"])


def test_a_distributed_checkpoint_of_another_format_is_refused(
    fsdp: Results, fsdp_folder: Path
) -> None:
    net = training.model("float32", codebook=torch.linspace(-1, 1, 16))
    state = {n: t for n, t in net.state_dict().items() if not n.endswith("codebook")}
    state |= {n: t for n, t in training.model("float32").state_dict().items() if "quant_meta" in n}
    load(state, storage_reader=FileSystemReader(fsdp_folder / "float32"), no_dist=True)
    with pytest.raises(RuntimeError, match=r"'format': 'nf4'.*this module takes.*'custom'"):
        net.load_state_dict(state, strict=False)


@pytest.mark.parametrize("way", ["shards", "full", "empty"])
def test_sharded_models_reload(reloaded: Results, way: str) -> None:
    for result in reloaded:
        assert_same(result[way], result["expected"])


def test_a_sharded_meta_model_knows_its_format(reloaded: Results) -> None:
    net = training.model("float32")
    for result in reloaded:
        for found, layer in zip(
            result["meta"], (net.table, net.blocks[1].down.base_layer), strict=True
        ):
            testing.assert_bitwise(found, layer.quant_meta)


def test_shards_of_another_format_are_refused(reloaded: Results) -> None:
    for result in reloaded:
        assert "'format': 'nf4'" in result["refused"]
        assert "this module takes" in result["refused"]


def test_fsdp2_trains_experts_as_one_process(tmp_path: Path) -> None:
    """Their codes and scales are sharded, and the whole checkpoint loads into one process."""
    results = run_processes(training, "fsdp_experts", "none", tmp_path)
    torch.set_num_threads(1)
    net = training.mixture()
    losses = training.train_mixture(net, range(2))
    for rank, result in enumerate(results):
        testing.assert_bitwise(torch.stack(result["losses"]), torch.stack(losses[rank::2]))
        assert_same(result["state"], training.state(net))
        here, whole = (sum(sizes) for sizes in zip(*result["bytes"].values(), strict=True))
        assert here < 0.52 * whole
        assert sum("experts" in name for name in result["bytes"]) >= 2 * 2 * 4
    again = training.mixture()
    state = again.state_dict()
    load(state, storage_reader=FileSystemReader(tmp_path / "experts"), no_dist=True)
    again.load_state_dict(state)
    assert_same(again.state_dict(), results[0]["state"])
