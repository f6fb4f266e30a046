"""``accelerate launch`` of QLoRA: DDP and FSDP2 compute what one process does, and go on from it.

The expected numbers are those of a plain loop without accelerate, where nothing is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qkern import testing
from tests.integrations import launched, launching
from tests.integrations.launching import ALONE, DDP, FSDP2, run

pytestmark = pytest.mark.slow

Ranks = list[dict[str, Any]]
KINDS = ("untied", "tied", "tied_in_4_bits")
EXACT = ("as_launched", "full", "checkpointed", "tied", "tied_in_4_bits")
"""Those of FSDP2 that compute what a plain loop does, bit for bit."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and of each number of processes what it saved."""
    root = tmp_path_factory.mktemp("launched")
    for place in ("one", "two"):
        launched.save_dense(root / place)
    return root


@pytest.fixture(scope="module")
def ddp(root: Path) -> Ranks:
    return run(DDP, 2, root / "ddp-two", "ddp", at=root / "two")


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    return run(ALONE, 1, root / "ddp-one", "ddp", at=root / "one")[0]["ddp"]


@pytest.fixture(scope="module")
def fsdp_alone(root: Path) -> dict[str, Any]:
    return run(FSDP2, 1, root / "fsdp-one", "fsdp", at=root / "one")[0]["fsdp"]


@pytest.fixture(scope="module")
def fsdp(root: Path) -> Ranks:
    return run(FSDP2, 2, root / "fsdp-two", "fsdp", at=root / "two")


@pytest.fixture(scope="module")
def plain(root: Path) -> dict[str, dict[str, Any]]:
    """What a loop without accelerate computes, by the kind of model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the processes
    try:
        return {kind: trained_plainly(root / "one", kind) for kind in KINDS}
    finally:
        torch.set_num_threads(threads)


def trained_plainly(folder: Path, kind: str) -> dict[str, Any]:
    model = launched.make_model(folder, kind)
    optimizer = launched.make_optimizer(model)
    found: dict[str, Any] = {"initial": launched.state(model)}
    losses = []
    for step, ids in enumerate(launched.batches(0, 2 * launched.STEPS)):
        optimizer.zero_grad()
        for half in range(2):
            loss = model(input_ids=ids[half], labels=ids[half]).loss
            (loss / 2).backward()
            losses.append(loss.detach())
        optimizer.step()
        if step == launched.STEPS - 1:
            found["state"] = launched.state(model)
    found["further"] = launched.state(model)
    found["losses"], found["further_losses"] = torch.stack(losses).view(2, -1, 2)
    return found


def losses_of(ranks: list[dict[str, Any]], name: str = "losses") -> Tensor:
    """``[steps, 2]``: each rank has a column."""
    columns = [torch.stack(result[name])[:, rank] for rank, result in enumerate(ranks)]
    return torch.stack(columns, 1) if len(ranks) > 1 else torch.stack(ranks[0][name])


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        testing.assert_bitwise(found[name], tensor, name)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Codes are equal, adapters but for rounding."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        else:
            testing.assert_bitwise(found[name], tensor, name)


def moved(found: dict[str, Tensor], initial: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in found.items() if not torch.equal(tensor, initial[name])}


def test_the_loop_trains_adapters_only(plain: dict[str, Any]) -> None:
    for kind in KINDS:
        changed = moved(plain[kind]["state"], plain[kind]["initial"])
        assert len(changed) == 28
        assert all("lora_" in name for name in changed)


# DDP


@pytest.mark.parametrize("name", launched.DDP)
def test_ddp_trains_as_one_process(ddp: Ranks, plain: dict[str, Any], name: str) -> None:
    """Also from rank 0's weights alone, which the others get at construction."""
    results = [rank["ddp"][name] for rank in ddp]
    testing.assert_bitwise(losses_of(results), plain["untied"]["losses"])
    for result in results:
        assert_same(result["state"], plain["untied"]["state"])


def test_ddp_sends_gradients_with_the_last_of_accumulated_batches(
    ddp: Ranks, alone: dict[str, Any]
) -> None:
    for rank in ddp:
        found = rank["ddp"]["accumulated"]
        assert_near(found["state"], alone["accumulated"]["state"])
        assert found["sent"] == launched.STEPS // 2


def test_one_process_of_accelerate_is_the_plain_loop(
    alone: dict[str, Any], fsdp_alone: dict[str, Any], plain: dict[str, Any]
) -> None:
    for result in (alone["plain"], fsdp_alone["as_launched"]):
        testing.assert_bitwise(losses_of([result]), plain["untied"]["losses"])
        assert_same(result["state"], plain["untied"]["state"])


# FSDP2


@pytest.mark.parametrize("name", EXACT)
def test_fsdp2_trains_as_one_process(fsdp: Ranks, plain: dict[str, Any], name: str) -> None:
    """Where loading spares memory, ranks but the first begin with zeros."""
    expected = plain[name if "tied" in name else "untied"]
    results = [rank["fsdp"][name] for rank in fsdp]
    testing.assert_bitwise(losses_of(results), expected["losses"])
    for result in results:
        assert_same(result["state"], expected["state"])
        assert_same(result["further"], expected["further"])


@pytest.mark.parametrize("name", ["bfloat16", "paged"])
def test_fsdp2_trains_as_one_process_of_fsdp2(
    fsdp: Ranks, fsdp_alone: dict[str, Any], name: str
) -> None:
    results = [rank["fsdp"][name] for rank in fsdp]
    testing.assert_bitwise(losses_of(results), losses_of([fsdp_alone[name]]))
    for result in results:
        assert_same(result["state"], fsdp_alone[name]["state"])


def test_bfloat16_and_other_optimizers_differ_by_rounding(
    fsdp: Ranks, plain: dict[str, Any]
) -> None:
    for name, tolerance in (("bfloat16", 2e-2), ("paged", 1e-4), ("paged_8bit", 2e-2)):
        found = losses_of([rank["fsdp"][name] for rank in fsdp])
        expected = plain["untied"]["losses"]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        assert not torch.equal(found, expected)


def test_each_rank_holds_half_of_the_codes(fsdp: Ranks) -> None:
    for name in launched.FSDP:
        held = [rank["fsdp"][name]["bytes"] for rank in fsdp]
        assert held[0][1] == held[1][1] > 0
        assert held[0][0] == held[1][0] == held[0][1] // 2


# What is saved


@pytest.mark.parametrize("name", [*launched.FSDP, "ddp"])
def test_state_dicts_and_saved_models_are_whole(
    ddp: Ranks, fsdp: Ranks, root: Path, name: str
) -> None:
    results = [
        rank["ddp"]["plain"] if name == "ddp" else rank["fsdp"][name]
        for rank in (ddp if name == "ddp" else fsdp)
    ]
    assert_same(results[0]["whole"], results[0]["state"])
    folder = root / "two" / (name if name == "ddp" else f"fsdp/{name}")
    files = load_file(folder / "model" / "model.safetensors")
    assert {name for name in results[0]["state"] if name not in files} <= TIED.get(name, set())
    for key, tensor in files.items():
        testing.assert_bitwise(tensor, results[0]["state"][key], key)


HEAD = "base_model.model.lm_head"
TIED = {
    "tied": {f"{HEAD}.weight"},
    "tied_in_4_bits": {
        f"{HEAD}.{part}"
        for part in ("weight", "absmax", "nested_absmax", "nested_offset", "quant_meta")
    },
}
"""What files leave out, since the table has it."""


# Resumed


def test_ddp_goes_on_in_other_processes(
    root: Path, ddp: Ranks, alone: dict[str, Any], plain: dict[str, Any]
) -> None:
    """Of two in one, and of one in two."""
    fewer = run(ALONE, 1, root / "ddp-fewer", "ddp_resumed", at=root / "two")
    more = run(DDP, 2, root / "ddp-more", "ddp_resumed", at=root / "one")
    for rank in (*fewer, *more):
        assert_same(rank["ddp_resumed"]["loaded"], plain["untied"]["state"])
        assert_same(rank["ddp_resumed"]["further"], plain["untied"]["further"])


@pytest.fixture(scope="module")
def fewer(root: Path, fsdp: Ranks) -> Ranks:
    return run(FSDP2, 1, root / "fsdp-fewer", "fsdp_resumed", at=root / "two")


@pytest.fixture(scope="module")
def more(root: Path, fsdp_alone: dict[str, Any]) -> Ranks:
    return run(FSDP2, 2, root / "fsdp-more", "fsdp_resumed", at=root / "one")


@pytest.mark.parametrize("name", ["as_launched", "full", "paged", "bfloat16"])
def test_fsdp2_goes_on_in_other_processes(
    fewer: Ranks, more: Ranks, fsdp_alone: dict[str, Any], name: str
) -> None:
    """As one that was never interrupted, whose every number is also that of two processes."""
    expected = fsdp_alone[name]
    for ranks in (fewer, more):
        results = [rank["fsdp_resumed"][name] for rank in ranks]
        further = losses_of([expected], "further_losses")
        testing.assert_bitwise(losses_of(results, "further_losses"), further)
        for result in results:
            assert_same(result["loaded"], expected["state"])
            assert_same(result["further"], expected["further"])


def test_moments_in_8_bits_go_on_in_other_processes(
    fewer: Ranks, more: Ranks, fsdp: Ranks, fsdp_alone: dict[str, Any]
) -> None:
    """Other shards have other blocks, so the moments are rounded anew.

    Without the moments the adapters would end further off than they move.
    """
    name = "paged_8bit"
    for ranks, before in ((fewer, fsdp[0]["fsdp"]), (more, fsdp_alone)):
        for rank in ranks:
            found = rank["fsdp_resumed"][name]
            start, expected = before[name]["state"], before[name]["further"]
            assert_same(found["loaded"], start)
            moves = distance(expected, start)
            assert 0 < distance(found["further"], expected) < 0.05 * moves


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The norm of the difference of all adapters."""
    parts = [(a[name] - b[name]).norm() for name in b if "lora_" in name]
    return float(torch.stack(parts).norm())


def test_accelerate_merges_the_shards_of_a_checkpoint(root: Path, fsdp: Ranks) -> None:
    checkpoint = root / "two" / "fsdp" / "as_launched" / "state" / "pytorch_model_fsdp_0"
    launching.cli("merge-weights", str(checkpoint), str(root / "merged"))
    assert_same(
        load_file(root / "merged" / "model.safetensors"), fsdp[0]["fsdp"]["as_launched"]["state"]
    )
