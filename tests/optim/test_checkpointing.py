"""State in and out: across pagers, widths and other AdamWs."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lab.fake_gpu import FakeGpu
from qkern import testing
from qkern.optim import PagedAdamW, PagedAdamW8bit, _driver
from qkern.optim._moments import BLOCK, Moments
from tests.optim.compare import assert_same, assert_same_state, close_to_fused, fused
from tests.optim.pagers import Made
from tests.optim.params import SHAPES, make_params, train

Change = Callable[[dict[str, Any]], None]
KINDS = [(pager, bits) for pager in ("none", "mmap", "unified") for bits in (32, 8)]


@pytest.mark.parametrize("saved", [False, True], ids=["state_dict", "torch.save"])
@pytest.mark.parametrize("to", KINDS, ids=lambda kind: f"to-{kind[0]}-{kind[1]}")
@pytest.mark.parametrize("start", KINDS, ids=lambda kind: f"from-{kind[0]}-{kind[1]}")
def test_checkpoints_across_pagers_and_widths(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: tuple[str, int],
    to: tuple[str, int],
    saved: bool,
) -> None:
    monkeypatch.setattr(_driver, "current", FakeGpu(eagerness=1.0))
    params, whole = make_params(), make_params()
    optimizer = Made(start[0], tmp_path)(params, bits=start[1], lr=1e-2)
    other = PagedAdamW(whole, pager="none", bits=start[1], lr=1e-2)
    train(optimizer, params, 5)
    train(other, whole, 5)
    state = optimizer.state_dict()
    if saved:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    if start[1] != to[1]:  # the conversion that is stated, done by hand
        for index, of_it in other.state_dict()["state"].items():
            wide = PagedAdamW(whole[index : index + 1], pager="none", bits=to[1], lr=1e-2)
            moments = Moments(*(of_it.get(key) for key in Moments._fields))
            bits = to[1] if whole[index].numel() >= 4096 else 32
            found = {k: v for k, v in moments.to_bits(bits)._asdict().items() if v is not None}
            wide.state[whole[index]] = {"step": of_it["step"].clone()} | found
            train(wide, make_params()[:0], 0)
            other.state[whole[index]] = wide.state[whole[index]]
        other.param_groups[0]["bits"] = to[1]
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = Made(to[0], tmp_path / "to")(fresh, bits=to[1], lr=0.5)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.param_groups[0]["bits"] == to[1]
    assert_same_state(optimizer.state_dict(), other.state_dict())
    train(optimizer, fresh, 5, 5)
    train(other, whole, 5, 5)
    assert_same(fresh, whole)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.DTYPE_NAMES.get)
def test_moments_stay_in_float32_whatever_the_parameters(make: Made, dtype: torch.dtype) -> None:
    params, whole = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer, other = make(params), PagedAdamW(whole)
    train(optimizer, params, 3)
    train(other, whole, 6)
    fresh = make(params)
    fresh.load_state_dict(optimizer.state_dict())
    state = fresh.state_dict()["state"]
    assert {t.dtype for s in state.values() for t in s.values()} == {torch.float32}
    train(fresh, params, 3, 3)
    assert_same(params, whole)


@pytest.mark.parametrize("bits", [32, 8])
def test_parameters_without_a_loaded_state_begin_anew(make: Made, bits: int) -> None:
    params, fresh = make_params(), make_params()
    optimizer, other = make(params, bits=bits), PagedAdamW(fresh, bits=bits)
    train(optimizer, params, 3)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {index: state["state"][index] for index in (0, 4)}
    optimizer.load_state_dict(state)
    other.load_state_dict(state)
    assert optimizer.state_dict()["state"].keys() == {0, 4}
    for param, value in zip(fresh, params, strict=True):
        param.data.copy_(value.detach())
    train(optimizer, params, 2, 3)
    train(other, fresh, 2, 3)
    assert_same(params, fresh)
    assert optimizer.state_dict()["state"][6]["step"] == 2


def test_a_step_that_parameters_share_in_a_checkpoint(make: Made) -> None:
    params, whole = make_params(), make_params()
    optimizer, other = make(params), PagedAdamW(whole)
    train(optimizer, params, 3)
    train(other, whole, 5)
    state = optimizer.state_dict()
    step = torch.tensor([3])
    for of_it in state["state"].values():
        of_it["step"] = step
    again = make(params)
    again.load_state_dict(state)
    train(again, params, 2, 3)
    assert_same(params, whole)
    assert step == 3


def test_loading_copies(make: Made) -> None:
    params, others = make_params(), make_params()
    optimizer, other = make(params), PagedAdamW(others)
    train(other, others, 2)
    state = other.state_dict()
    kept = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(optimizer, params, 2, 2)
    assert_same_state(state, kept)


@pytest.mark.parametrize("foreign", ["fused", "plain", "channels last"])
def test_from_torch_and_back(make: Made, foreign: str) -> None:
    """torch's moments have the parameter's strides; the checkpoint need not be contiguous."""
    shapes = (*SHAPES, (4, 6, 5, 3))
    ours, theirs = make_params(shapes), make_params(shapes)
    if foreign == "channels last":
        for params in (ours, theirs):
            params[-1].data = params[-1].data.to(memory_format=torch.channels_last)
            params[4].data = params[4].data.mT.contiguous().mT
    # The fused one takes a gradient for one in the parameter's strides.
    cls = fused if foreign == "fused" else torch.optim.AdamW
    optimizer, other = make(ours), cls(theirs)
    train(other, theirs, 4)
    for param, value in zip(ours, theirs, strict=True):
        param.data.copy_(value.detach())
    optimizer.load_state_dict(other.state_dict())
    train(optimizer, ours, 4, 4)
    train(other, theirs, 4, 4)
    close_to_fused(ours, theirs, 8)
    back = cls([nn.Parameter(p.detach().clone()) for p in ours])
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's may share tensors
    train(back, back.param_groups[0]["params"], 4, 8)
    train(optimizer, ours, 4, 8)
    close_to_fused(ours, back.param_groups[0]["params"], 12)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", ["AdamW", "PagedAdamW", "AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_from_bitsandbytes(make: Made, name: str, bits: int) -> None:
    """Continued as its own optimizer continues, of which the 8-bit codes may differ at ties."""
    shapes = (*SHAPES[:3], *SHAPES[4:])
    theirs = make_params(shapes)
    other = getattr(bitsandbytes.optim, name)(theirs, lr=1e-2, weight_decay=0.1)
    train(other, theirs, 4)
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = make(ours, bits=bits)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["bits"]) == (1e-2, 0.1, bits)
    state = optimizer.state_dict()["state"]
    for index, param in enumerate(theirs):
        assert state[index]["step"] == 4
        found = Moments(*(state[index].get(key) for key in Moments._fields))
        in_theirs = other.state[param]
        moments = Moments(*(in_theirs.get(k) for k in ("state1", "state2", "absmax1", "absmax2")))
        assert moments.bits == (8 if "8bit" in name and param.numel() >= 4096 else 32)
        for a, b in zip(found, moments.to_bits(found.bits), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                testing.assert_bitwise(a, b)
    train(optimizer, ours, 4, 4)
    train(other, theirs, 4, 4)
    coarse = 0.02 if bits == 8 or "8bit" in name else 1e-6
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= coarse


def test_bitsandbytes_decodes_these_moments_alike() -> None:
    (param,) = params = make_params(((5000,),))
    optimizer = PagedAdamW8bit(params)
    train(optimizer, params, 3)
    state = optimizer.state[param]
    moments = Moments(*(state[key] for key in Moments._fields)).to_bits(32)
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        code = bitsandbytes.functional.create_dynamic_map(signed=signed)
        decoded = bitsandbytes.functional.dequantize_blockwise(
            state[key], absmax=state[f"{key}_absmax"], code=code, blocksize=BLOCK
        )
        testing.assert_bitwise(decoded, getattr(moments, key))


def foreign_state(change: str) -> dict[str, Any]:
    params = make_params()
    if change == "amsgrad":
        other: torch.optim.Optimizer = torch.optim.AdamW(params, amsgrad=True)
    elif change == "sgd":
        other = torch.optim.SGD(params, momentum=0.9)
    else:
        other = PagedAdamW(params, bits=8)
    train(other, params, 1)
    state = copy.deepcopy(other.state_dict())
    if change == "shape":
        state["state"][4]["exp_avg"] = state["state"][4]["exp_avg"].view(96, 64)
    elif change == "scales":
        state["state"][5]["exp_avg_sq_absmax"] = torch.zeros(3)
    elif change == "no scales":
        del state["state"][5]["exp_avg_absmax"]
    elif change == "map":
        state["state"][4]["qmap1"] = torch.linspace(-1, 1, 256)
    elif change == "groups":
        state["param_groups"] *= 2
    elif change == "params":
        state["param_groups"][0]["params"].pop()
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("amsgrad", r"AMSGrad|amsgrad"),
        ("sgd", r"state\[0\]: got no (step|exp_avg); takes the state of an Adam or AdamW"),
        ("shape", r"state\[4\].exp_avg: got shape \[96, 64\]; takes \[64, 96\]"),
        ("scales", r"state\[5\].exp_avg_sq_absmax: got 3 scales; takes 20, one for each 256"),
        ("no scales", r"state\[5\].exp_avg_absmax: got none; takes 20"),
        ("map", r"state\[4\].qmap1: got another map"),
        ("groups", "param_groups: got 2 groups; takes 1"),
        ("params", r"param_groups\[0\].params: got 6 parameters; takes 7"),
    ],
)
def test_states_that_are_refused_change_nothing(make: Made, change: str, message: str) -> None:
    params = make_params()
    optimizer = make(params)
    train(optimizer, params, 2)
    kept = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign_state(change))
    assert_same_state(optimizer.state_dict(), kept)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def changed(key: str, change: Callable[[Any], Any], parameter: int = 4) -> Change:
    def apply(state: dict[str, Any]) -> None:
        state["state"][parameter][key] = change(state["state"][parameter][key])

    return apply


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    return lambda moment: moment.index_fill(0, torch.tensor(0), value)


def option(name: str, value: Any) -> Change:
    return lambda state: state["param_groups"][0].__setitem__(name, value)


JUNK: dict[str, tuple[Change, str]] = {
    **{
        f"step {junk}": (changed("step", lambda _, junk=junk: junk), r"\[4\].step: got .*takes")
        for junk in (-1, 1.5, math.nan, math.inf, True, "1", None, 1 << 54, torch.ones(2), 1j)
    },
    "step of truth": (changed("step", lambda _: torch.tensor(True)), r"\[4\].step: got True"),
    "step on meta": (changed("step", lambda _: torch.ones((), device="meta")), "step: got shape"),
    **{
        f"{key} {kind}": (
            changed(key, lambda moment, kind=kind: moment.to(kind)),
            rf"\[4\].{key}: got {kind}; takes floats",
        )
        for key in ("exp_avg", "exp_avg_sq")
        for kind in (torch.int64, torch.int8, torch.bool, torch.complex64)
    },
    **{
        f"{key} {value}": (
            changed(key, with_first(value)),
            rf"\[4\].{key}: got (infinities or NaN; takes finite|values below 0; takes 0)",
        )
        for key in ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
        for value in (math.nan, math.inf, -math.inf, -1.0)
        if (key, value) != ("exp_avg", -1.0)
    },
    "too large": (changed("exp_avg", lambda m: m.double() + 1e300), "exp_avg: got infinities"),
    "mixed": (changed("exp_avg_sq", lambda m: m.byte()), "exp_avg_sq: got torch.uint8; takes"),
    "sparse": (changed("exp_avg", Tensor.to_sparse), "exp_avg: got torch.sparse"),
    "meta": (changed("exp_avg", lambda m: m.to("meta")), "exp_avg: got .* on meta; takes"),
    "no tensor": (changed("exp_avg", lambda m: m.tolist()), "exp_avg: got list; takes a tensor"),
    "whole scales": (
        changed("exp_avg_absmax", lambda m: m.int()),
        "exp_avg_absmax: got torch.int32 on cpu; takes floats",
    ),
    "list of scales": (changed("exp_avg_absmax", lambda m: m.tolist()), "absmax: got none; takes"),
    "lr": (option("lr", math.nan), r"param_groups\[0\].lr: got nan"),
    "eps": (option("eps", "1e-8"), r"param_groups\[0\].eps: got str; takes a real number"),
    "betas": (option("betas", (0.9, 2.0)), r"param_groups\[0\].betas: got \(0.9, 2.0\)"),
    "maximize": (option("maximize", "no"), r"param_groups\[0\].maximize: got 'no'; takes True or"),
}


@pytest.mark.parametrize(("change", "message"), JUNK.values(), ids=JUNK)
def test_junk_in_a_state_is_refused_and_changes_nothing(
    make: Made, change: Change, message: str
) -> None:
    params, others = make_params(), make_params()
    optimizer = make(params)
    train(optimizer, params, 1)
    kept = copy.deepcopy(optimizer.state_dict())
    # Where there are scales, of 8 bits.
    other = PagedAdamW(others, bits=8 if "absmax" in message or "scales" in message else 32)
    train(other, others, 1)
    state = copy.deepcopy(other.state_dict())
    change(state)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(state)
    assert_same_state(optimizer.state_dict(), kept)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moments_of_other_floats_are_taken(make: Made, dtype: torch.dtype) -> None:
    params, others = make_params(), make_params()
    optimizer, other = make(params), PagedAdamW(others)
    train(other, others, 1)
    state = copy.deepcopy(other.state_dict())
    for of_it in state["state"].values():
        of_it |= {key: of_it[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")}
        of_it["step"] = np.int64(1)
    optimizer.load_state_dict(state)
    found = optimizer.state_dict()["state"]
    for index, of_it in state["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            testing.assert_bitwise(found[index][key], of_it[key].float())
        assert found[index]["step"] == 1


def test_amsgrad_is_refused_without_a_state_too() -> None:
    state = torch.optim.AdamW(make_params(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad: got True"):
        PagedAdamW(make_params()).load_state_dict(state)


def test_hooks_see_what_torchs_do(make: Made) -> None:
    params, others = make_params(), make_params()
    optimizer, other = make(params), PagedAdamW(others)
    train(other, others, 2)
    seen: list[set[str]] = []
    optimizer.register_load_state_dict_pre_hook(
        lambda self, state: seen.append(set(state["state"][0])) or None
    )
    optimizer.register_load_state_dict_post_hook(
        lambda self: seen.append(set(self.state_dict()["state"][0]))
    )
    optimizer.register_state_dict_post_hook(
        lambda self, state: seen.append(set(state["state"][0])) or None
    )
    optimizer.load_state_dict(other.state_dict())
    assert seen == [{"step", "exp_avg", "exp_avg_sq"}] * 3


def copied(optimizer: PagedAdamW, how: str) -> PagedAdamW:
    return copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how: str) -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = PagedAdamW(
        params, bits=8, max_grad_norm=0.1, min_8bit_size=1000, stochastic_rounding=True, seed=3
    )
    train(optimizer, params, 3)
    other = copied(optimizer, how)
    others = other.param_groups[0]["params"]
    assert_same(others, params)
    train(optimizer, params, 3, 3)
    train(other, others, 3, 3)
    assert_same(others, params)
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert other.pager == "none"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_file_cannot_be_copied(tmp_path: Path, how: str) -> None:
    optimizer = PagedAdamW(make_params(), path=tmp_path / "state")
    with pytest.raises(TypeError, match=r"state_dict"):
        copied(optimizer, how)
