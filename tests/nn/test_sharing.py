"""Layers that share an input: one call, and never another result than without it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkern
from qkern import backends, testing
from qkern import nn as qnn
from qkern.backends import cpu
from qkern.nn import sharing
from tests.models import tiny_llama

pytestmark = pytest.mark.skipif("linears_4bit" not in cpu.fast, reason="qkern._C is not built")

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            self.add_module(name, nn.Linear(64, 32, bias=bias, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def shared(**options: Any) -> Attention:
    return qnn.share_inputs(qnn.quantize_model(Attention(**options)))


def apart(**options: Any) -> Attention:
    return qnn.quantize_model(Attention(**options))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of weights in each call of the kernels."""
    found: list[int] = []
    fast = dict(cpu.fast)

    def several(x: Tensor, weights: Any, *others: Any) -> Any:
        found.append(len(weights))
        return fast["linears_4bit"](x, weights, *others)

    def single(*arguments: Any) -> Any:
        found.append(1)
        return fast["linear_4bit"](*arguments)

    monkeypatch.setattr(cpu, "fast", fast | {"linears_4bit": several, "linear_4bit": single})
    qkern.linear_4bit(torch.randn(1, 64), qkern.quantize_4bit(torch.randn(4, 64)))
    found.clear()
    return found


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_one_call_with_the_same_bits(calls: list[int], dtype: torch.dtype, bias: bool) -> None:
    model, expected = shared(dtype=dtype, bias=bias), apart(dtype=dtype, bias=bias)
    for x in (torch.randn(1, 64), torch.randn(2, 4, 64), torch.randn(64)):
        calls.clear()
        y = model(x.to(dtype))
        assert calls == [3]
        testing.assert_bitwise(y, expected(x.to(dtype)))
    calls.clear()
    many = torch.randn(9, 64).to(dtype)
    testing.assert_bitwise(model(many), expected(many))
    assert calls == [1] * 6
    assert model.q_proj._shared._kept is None


@torch.no_grad()
def test_an_input_that_changed_in_place_is_another(calls: list[int]) -> None:
    model, expected = shared(), apart()
    for inference in (False, True):
        with torch.inference_mode(inference):
            x = torch.randn(1, 64)
            testing.assert_bitwise(model.q_proj(x), expected.q_proj(x))
            x.add_(1)
            testing.assert_bitwise(model.k_proj(x), expected.k_proj(x))
            x.sub_(0.5)
            testing.assert_bitwise(model.v_proj(x), expected.v_proj(x))
            # The same values in another tensor are the same input.
            calls.clear()
            testing.assert_bitwise(model.q_proj(x.clone()), expected.q_proj(x))
    assert calls[0] in (1, 3)


CHANGES: dict[str, Callable[[qnn.Linear4bit], Any]] = {
    "in_place": lambda layer: layer.weight.bitwise_not_(),
    "data": lambda layer: setattr(layer.weight, "data", ~layer.weight),
    "assigned": lambda layer: setattr(layer, "weight", ~layer.weight),
    "scales": lambda layer: layer.nested_absmax.add_(1 << 23),
    "bias": lambda layer: layer.bias.add_(1),
    "no_bias": lambda layer: setattr(layer, "bias", None),
    "compute_dtype": lambda layer: setattr(layer, "compute_dtype", torch.bfloat16),
    "state_dict": lambda layer: layer.load_state_dict(
        qnn.Linear4bit.from_linear(nn.Linear(64, 32)).state_dict()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_weight_that_changed_is_another(change: str) -> None:
    model, x = shared(bias=True), torch.randn(1, 64)
    model.q_proj(x)
    kept = model.k_proj._shared._kept
    assert id(model.k_proj) in kept.results
    before = kept.results[id(model.k_proj)][0]
    CHANGES[change](model.k_proj)
    y = model.k_proj(x)
    testing.assert_bitwise(y, qnn.share_inputs(model, enabled=False).k_proj(x))
    assert not torch.equal(y, before)


@torch.no_grad()
def test_a_result_is_handed_out_once(calls: list[int]) -> None:
    model, expected, x = shared(), apart(), torch.randn(1, 64)
    model.q_proj(x)
    first = model.k_proj(x)
    want = first.clone()
    first.zero_()
    testing.assert_bitwise(model.k_proj(x), want)
    testing.assert_bitwise(model.v_proj(x), expected.v_proj(x))


def test_nothing_is_shared_where_gradients_are_recorded(calls: list[int]) -> None:
    model, expected = shared(bias=True), apart(bias=True)
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    got, x.grad = x.grad, None
    expected(x).sum().backward()
    testing.assert_bitwise(got, x.grad)
    # Of the layers' own: the result of one that is trained has a graph.
    model.k_proj.bias.requires_grad_(True)
    x = torch.randn(1, 64)
    assert not model.q_proj(x).requires_grad
    y = model.k_proj(x)
    y.sum().backward()
    assert model.k_proj.bias.grad is not None


@torch.no_grad()
def test_blocks_autocast_modes_and_compilers() -> None:
    model, expected, x = shared(), apart(), torch.randn(3, 64)
    with qkern.batch_invariant():
        testing.assert_bitwise(model(x)[:1], model(x[:1]))
    with backends.use("reference"):
        testing.assert_bitwise(model(x), expected(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        testing.assert_bitwise(model(x), expected(x))
    with torch.profiler.profile() as profile:
        model(x)
    assert sum(event.name == "qkern::linear_4bit" for event in profile.events()) == 3
    # Between the calls of one group, too.
    model.q_proj(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.k_proj(x).dtype == torch.bfloat16
    with qkern.batch_invariant():
        testing.assert_bitwise(model.v_proj(x)[:1], model.v_proj(x[:1]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    testing.assert_bitwise(compiled(x), expected(x))


@torch.no_grad()
def test_a_group_of_which_one_is_called_stops(calls: list[int]) -> None:
    model, x = shared(), torch.randn(1, 64)
    for step in range(10):
        model.k_proj(x + step)
    assert calls == [3] * 5 + [1] * 5
    # Nor does a group that is used stop for one call that came alone.
    model = shared()
    for step in range(10):
        model(x + step)
        model.k_proj(x)
    calls.clear()
    model(x)
    assert calls == [3]


@torch.no_grad()
def test_threads() -> None:
    model, expected = shared(), apart()
    inputs = [torch.randn(1, 64) for _ in range(4)]
    wanted = [expected(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(200):
                for x, y in zip(inputs, wanted, strict=True):
                    if not torch.equal(model(x), y):
                        wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_copies_do_not_share_and_nothing_is_kept_alive(calls: list[int]) -> None:
    model, x = shared(), torch.randn(1, 64)
    model.q_proj(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model.k_proj)):
        layers = [m for m in twin.modules() if isinstance(m, qnn.Linear4bit)]
        assert all(layer._shared is None for layer in layers)
    twin = copy.deepcopy(model)
    twin.k_proj.weight.bitwise_not_()
    calls.clear()
    twin(x)
    assert calls == [1, 1, 1]
    alone = weakref.ref(model.k_proj)
    query = model.q_proj
    del model
    gc.collect()
    # One result of the last call may be kept, but no layer.
    assert alone() is None
    testing.assert_bitwise(query(x), apart().q_proj(x))
    dense = qnn.dequantize_model(shared())
    assert "_shared" not in vars(dense.q_proj)


@torch.no_grad()
def test_a_model_of_transformers(calls: list[int]) -> None:
    plain = qnn.quantize_model(tiny_llama()).eval()
    model = qnn.share_inputs(copy.deepcopy(plain))
    ids = torch.arange(7)[None]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    calls.clear()
    model(ids)
    layers = plain.config.num_hidden_layers
    assert sorted(calls) == [1] * 2 * layers + [2] * layers + [3] * layers
    qnn.share_inputs(model, enabled=False)
    calls.clear()
    model(ids)
    assert set(calls) == {1}


def test_hooks_see_every_call() -> None:
    model, seen = shared(), []
    for name in NAMES:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        model(torch.randn(1, 64))
    assert seen == list(NAMES)


def test_adapters_are_refused_or_passed_by() -> None:
    adapted = qnn.add_lora(apart(), qnn.LoRAConfig(r=2, targets=["k_proj"]))
    with pytest.raises(ValueError, match="k_proj has an adapter"):
        qnn.share_inputs(adapted)
    with pytest.raises(ValueError, match="groups: no module of model"):
        qnn.share_inputs(nn.Sequential(nn.Linear(4, 4)))
    model = qnn.add_lora(shared(), qnn.LoRAConfig(r=2, targets=["k_proj"]))
    expected = qnn.add_lora(apart(), qnn.LoRAConfig(r=2, targets=["k_proj"]))
    for one in (model, expected):
        nn.init.constant_(one.k_proj.lora_a, 0.1)
        nn.init.constant_(one.k_proj.lora_b, 0.1)
    with torch.no_grad():
        for _ in range(sharing._MOST_LEFT + 2):
            x = torch.randn(1, 64)
            testing.assert_bitwise(model(x), expected(x))
    x = torch.randn(1, 64)
    model(x).sum().backward()
    expected(x).sum().backward()
    testing.assert_bitwise(model.k_proj.lora_b.grad, expected.k_proj.lora_b.grad)
