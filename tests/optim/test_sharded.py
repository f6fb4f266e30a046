"""8-bit moments of sharded parameters: which blocks they have, and how they change hands.

The other side of each comparison is one process that has the shards as parameters of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkern import formats, testing
from qkern.optim import PagedAdamW
from qkern.optim._moments import BLOCK, MAPS, Moments
from tests.optim import sharded
from tests.optim.compare import assert_same
from tests.optim.processes import run_processes
from tests.optim.sharded import HALF, LEAST, OPTIONS, Layers

pagers = pytest.mark.parametrize("pager", ["none", "mmap", "unified"])
WHOLE_ON_ANY = (0,)  # parameters whose shards end on the ends of blocks
WHOLE_ON_TWO = (0, 1)


class Apart:
    """One process with the shards that some ranks would have, each a parameter."""

    def __init__(
        self, world: int, params: Sequence[Tensor] | None = None, dim: int = 0, **options: Any
    ) -> None:
        self.world, self.dim = world, dim
        self.wholes = [param.detach() for param in (params or Layers())]
        self.shards = [[nn.Parameter(part.clone()) for part in self.cut(t)] for t in self.wholes]
        groups = [
            {"params": parts, "bits": 8 if whole.numel() >= LEAST else 32}
            for whole, parts in zip(self.wholes, self.shards, strict=True)
        ]
        self.optimizer = PagedAdamW(groups, **OPTIONS | {"min_8bit_size": 1} | options)

    def cut(self, whole: Tensor) -> list[Tensor]:
        """A part for each rank, as FSDP2 cuts rows; ranks without any are left out."""
        parts = whole.split(-(-whole.shape[self.dim] // self.world), dim=self.dim)
        return [part.contiguous() for part in parts]

    def train(self, first: int, steps: int = HALF) -> None:
        for step in range(first, first + steps):
            sharded.set_grads(self.wholes, step)
            for whole, parts in zip(self.wholes, self.shards, strict=True):
                assert whole.grad is not None
                for part, grad in zip(parts, self.cut(whole.grad), strict=True):
                    part.grad = grad.clone()
            self.optimizer.step()

    def joined(self) -> list[Tensor]:
        return [torch.cat([p.detach() for p in parts], self.dim) for parts in self.shards]


def assert_same_results(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same(actual["params"], expected["params"])
    for a, b in zip(actual["state"], expected["state"], strict=True):
        assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in b:
            testing.assert_bitwise(a[key], b[key], key)


# Moments that come back from floats.


def decoded(codes: Tensor, absmax: Tensor, map: str) -> Tensor:
    table = formats.map_tensor(map)
    return table[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 5 * 256, 5 * 256 + 100])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 3e20])
def test_floats_give_the_same_codes_and_scales_again(n: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(n)
    exp_avg = torch.randn(n, generator=generator) * scale
    if n > 256:
        exp_avg[:256] = 0.0
    first = Moments(exp_avg, torch.rand(n, generator=generator) * scale).to_bits(8)
    floats = first.to_reversible()
    again = floats.to_bits(8)
    for name, a, b in zip(Moments._fields, again, first, strict=True):
        testing.assert_bitwise(a, b, name)
    # One value a block is not the decoded one, but the scale: what it was before.
    values = (floats.exp_avg, floats.exp_avg_sq)
    codes = (first.exp_avg, first.exp_avg_sq)
    for value, code, absmax, map in zip(values, codes, first.absmaxes(), MAPS, strict=True):
        differs = value != decoded(code, absmax, map)
        assert differs.sum() <= absmax.numel()
        assert all(v in absmax for v in value[differs].abs())


def test_every_code_comes_back_from_every_place_in_a_block() -> None:
    """All codes beside a largest value of either sign: the signed map has 1 and not -1."""
    for sign in (1.0, -1.0):
        codes = []
        for map in MAPS:
            values = formats.map_tensor(map).clone() * 0.7
            values[3] = sign if map == "signed" else 1.0
            codes.append(values)
        first = Moments(*codes).to_bits(8)
        again = first.to_reversible().to_bits(8)
        for a, b in zip(again, first, strict=True):
            testing.assert_bitwise(a, b)
        decoded_alone = first.to_bits(32).to_bits(8)
        assert (decoded_alone.absmaxes()[0] == first.absmaxes()[0]).all() == (sign > 0)


def test_32_bits_stay_as_they_are() -> None:
    moments = Moments(torch.randn(300), torch.rand(300))
    assert moments.to_reversible() is moments


def test_a_negative_largest_beside_a_positive_of_its_magnitude() -> None:
    """Both decode to the same magnitude, below the scale; only the negative one has that scale."""
    code = float(formats.map_tensor("signed")[-2])  # the greatest below 1, as -code is the lowest
    for largest in (-1.0, -3.0e-20, -1.7e30):
        for first in ("positive", "negative"):
            values = torch.zeros(300)
            values[7 if first == "positive" else 90] = -code * largest
            values[90 if first == "positive" else 7] = largest
            values[270] = -0.5 * largest
            moments = Moments(values, values.abs()).to_bits(8)
            wide = moments.to_reversible()
            assert wide.exp_avg.min() == largest
            assert wide.exp_avg.max() < -largest
            for a, b in zip(wide.to_bits(8), moments, strict=True):
                testing.assert_bitwise(a, b)


@pytest.mark.parametrize("seed", range(20))
def test_there_and_back_changes_no_code(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (4 * seed - 40)
    for n in (1, 255, 256, 257, 20_000):
        values = torch.randn(n, generator=generator) * scale
        if seed % 3 == 0:  # few values, so that many share a code and a magnitude
            values = (values / scale * 3).round() * scale
        moments = Moments(values, values.abs()).to_bits(8)
        for a, b in zip(moments.to_reversible().to_bits(8), moments, strict=True):
            testing.assert_bitwise(a, b)


# Training.


@pytest.mark.parametrize(
    ("world", "pager"), [(2, "none"), (2, "mmap"), (2, "unified"), (3, "none")]
)
@pytest.mark.slow
def test_shards_have_blocks_of_their_own(tmp_path: Path, pager: str, world: int) -> None:
    results = run_processes(sharded, "straight", pager, tmp_path, world)
    apart = Apart(world)
    apart.train(0, 2 * HALF)
    for result in results:
        assert_same_results(result, results[0])
    assert_same(results[0]["params"], apart.joined())
    counts = [result["shards"] for result in results]
    assert [sum(of_param) for of_param in zip(*counts, strict=True)] == [
        whole.numel() for whole in apart.wholes
    ]
    assert counts[-1][4] == 0  # of one row
    if pager == "none":
        assert results[-1]["bits"] == [8, 8, 8, 8, 8, 32, 8]
    # Where shards end on the ends of blocks, that is what one process does with the whole.
    alone = Apart(1)
    alone.train(0, 2 * HALF)
    for index in WHOLE_ON_TWO if world == 2 else WHOLE_ON_ANY:
        testing.assert_bitwise(results[0]["params"][index], alone.joined()[index])


@pytest.mark.slow
def test_low_precision_and_clipping(tmp_path: Path) -> None:
    first, second = run_processes(sharded, "clipped", "none", tmp_path)
    assert_same_results(first, second)
    apart = Apart(2, list(Layers(torch.bfloat16)), max_grad_norm=0.5)
    apart.train(0)
    torch.testing.assert_close(first["grad_norm"], apart.optimizer.grad_norm)
    for a, b in zip(first["params"], apart.joined(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)


@pagers
@pytest.mark.slow
def test_other_placements(tmp_path: Path, pager: str) -> None:
    matrices = [param for param in Layers() if param.dim() > 1]
    expected = {}
    for name, parts in (("replicated", 1), ("columns", 2)):
        apart = Apart(parts, matrices, dim=1)
        apart.train(0, 2 * HALF)
        expected[name] = apart.joined()
    for result in run_processes(sharded, "placed", pager, tmp_path):
        for name, params in expected.items():
            assert_same(result[name]["params"], params)


# Checkpoints.


def requantised(state: Sequence[dict[str, Tensor]], apart: Apart) -> Iterator[dict[str, Any]]:
    """States for the shards of ``apart`` from whole moments in 32 bits."""
    for of_param, whole in zip(state, apart.wholes, strict=True):
        pairs = zip(apart.cut(of_param["exp_avg"]), apart.cut(of_param["exp_avg_sq"]), strict=True)
        for pair in pairs:
            moments = Moments(*(t.clone() for t in pair))
            if whole.numel() >= LEAST:
                moments = moments.to_bits(8)
            found = {k: v for k, v in moments._asdict().items() if v is not None}
            yield {"step": of_param["step"].clone()} | found


@pytest.fixture(scope="module", params=[1, 2])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, dict[str, Any]]:
    """How many ranks saved it, where it is and what they had."""
    folder = tmp_path_factory.mktemp("saved")
    return request.param, folder, run_processes(sharded, "saved", "none", folder, request.param)[0]


@pytest.mark.parametrize("to", [1, 2, 3])
@pytest.mark.slow
def test_any_number_of_ranks_takes_up_a_checkpoint(
    checkpoint: tuple[int, Path, dict[str, Any]], to: int
) -> None:
    start, folder, before = checkpoint
    straight, apart = Apart(start), Apart(to)
    straight.train(0, 2 * HALF)
    state = dict(enumerate(requantised(before["state"], apart)))
    apart.optimizer.load_state_dict(apart.optimizer.state_dict() | {"state": state})
    for parts, value in zip(apart.shards, before["params"], strict=True):
        for part, data in zip(parts, apart.cut(value), strict=True):
            part.data.copy_(data)
    apart.train(HALF)
    for rank in run_processes(sharded, "loaded", "none", folder, to):
        for kind in sharded.KINDS:
            assert_same(rank[kind]["params"], apart.joined())
            lossless = range(len(Layers.SHAPES))
            if start != to:
                lossless = WHOLE_ON_TWO if 3 not in (start, to) else WHOLE_ON_ANY
            for index in lossless:
                testing.assert_bitwise(rank[kind]["params"][index], straight.joined()[index])


@pytest.mark.parametrize("pager", ["mmap", "unified"])
@pytest.mark.slow
def test_pagers_save_and_load_alike(tmp_path: Path, pager: str) -> None:
    run_processes(sharded, "saved", pager, tmp_path)
    straight = Apart(2)
    straight.train(0, 2 * HALF)
    for rank in run_processes(sharded, "loaded", pager, tmp_path):
        for result in rank.values():
            assert_same(result["params"], straight.joined())


@pagers
@pytest.mark.slow
def test_each_rank_for_itself(tmp_path: Path, pager: str) -> None:
    straight = Apart(2)
    straight.train(0, 2 * HALF)
    for rank in run_processes(sharded, "own_state", pager, tmp_path):
        for result in rank.values():
            assert_same(result["params"], straight.joined())


@pytest.mark.slow
def test_other_widths_and_optimizers_take_up_a_checkpoint(tmp_path: Path) -> None:
    """Saved in 8 bits by two ranks; gone on with in 32, by two ranks and by one process alone."""
    before = run_processes(sharded, "saved", "none", tmp_path)[0]
    full = torch.load(tmp_path / "full-0")
    results = []
    for cls in (PagedAdamW, torch.optim.AdamW):
        params = [nn.Parameter(value.clone()) for value in before["params"]]
        optimizer = cls(params, lr=1e-2)
        optimizer.load_state_dict(full_of(optimizer, full))
        sharded.train(optimizer, params, HALF)
        results.append([param.detach() for param in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for rank in run_processes(sharded, "loaded_in_32_bits", "none", tmp_path):
        for result in rank.values():
            assert_same(result["params"], results[0])


@pytest.mark.slow
def test_distributed_checkpoints_beside_unsharded_parameters(tmp_path: Path) -> None:
    """What torch would read wrongly is refused, by it or here."""
    (result,) = run_processes(sharded, "beside_unsharded", "none", tmp_path, world=1)
    first = Apart(1)
    first.train(0)
    params = [nn.Parameter(t) for t in first.joined()]
    optimizer = PagedAdamW(params, **OPTIONS | {"bits": 32})
    moments = [
        Moments(*(first.optimizer.state[part].get(k) for k in Moments._fields)).to_reversible()
        for (part,) in first.shards
    ]
    state = {
        index: {"step": torch.tensor(float(HALF)), "exp_avg": m.exp_avg, "exp_avg_sq": m.exp_avg_sq}
        for index, m in enumerate(moments)
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    sharded.train(optimizer, params, HALF)
    assert_same(result["to 32 bits"], params)
    assert "Missing key in checkpoint state_dict: state.0.exp_avg_absmax" in result["to 8 bits"]
    assert "exp_avg: got whole numbers from 0 to 255 as floats" in result["from 8 bits"]


def full_of(optimizer: torch.optim.Optimizer, full: dict[str, Any]) -> dict[str, Any]:
    """A full state, whose parameters have names, with the numbers of an optimizer alone."""
    names = full["param_groups"][0]["params"]
    state = {index: full["state"][name] for index, name in enumerate(names)}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


# What must not be taken for moments.


def state_of_8_bits() -> dict[str, Any]:
    params = list(Layers())
    optimizer = PagedAdamW(params, **OPTIONS)
    sharded.train(optimizer, params, 0)
    return optimizer.state_dict()


@pytest.mark.parametrize("bits", [32, 8])
def test_codes_read_as_floats_are_refused(bits: int) -> None:
    """``torch.distributed.checkpoint`` copies codes into float32 tensors without a word."""
    state = state_of_8_bits()
    for of_param in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            of_param[key] = of_param[key].float()
        for key in ("exp_avg_absmax", "exp_avg_sq_absmax"):
            of_param.pop(key, None)
    optimizer = PagedAdamW(Layers().parameters(), bits=bits)
    with pytest.raises(ValueError, match=r"state\[0\].exp_avg: got whole numbers from 0 to 255"):
        optimizer.load_state_dict(state)


def test_scales_beside_floats_are_refused() -> None:
    state = state_of_8_bits()
    for of_param in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            of_param[key] = of_param[key].float()
    optimizer = PagedAdamW(Layers().parameters())
    with pytest.raises(ValueError, match=r"exp_avg_absmax: got scales; takes none beside"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_moments_of_zeros_and_ones_are_not_taken_for_codes(value: float) -> None:
    params = list(Layers().parameters())
    optimizer = PagedAdamW(params)
    sharded.train(optimizer, params, 0, 1)
    state = optimizer.state_dict()
    for of_param in state["state"].values():
        of_param["exp_avg"], of_param["exp_avg_sq"] = (
            torch.full_like(of_param[k], value) for k in ("exp_avg", "exp_avg_sq")
        )
    optimizer.load_state_dict(state)
