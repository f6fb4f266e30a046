"""Experts of transformers' models in 4 bits compute what its own eager code does.

That runs on the dequantised weights.
"""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch

from qkern import nn as qnn
from tests.experts_of_models import IDS, MODELS, eager, experts_of, near, quantised

models = pytest.mark.parametrize("name", MODELS)
ROUTER = re.compile(r"\.(gate|router)\.weight$")


@models
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_loss_and_gradients_are_those_of_eager(name: str, training: bool) -> None:
    """Of the input and of routers, with the loss that balances experts where there is one."""
    model = quantised(name).train(training)
    assert len(experts_of(model)) == (2 if name in ("deepseek_v3", "glm4_moe") else 4)
    other = eager(model)
    results = []
    for each in (model, other):
        routers = {n: p.requires_grad_() for n, p in each.named_parameters() if ROUTER.search(n)}
        assert routers
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        out = each(inputs_embeds=embedded, labels=IDS, use_cache=False)
        out.loss.backward()
        found = {"logits": out.logits, "loss": out.loss, "input": embedded.grad}
        if getattr(out, "aux_loss", None) is not None:
            found["aux_loss"] = out.aux_loss
        results.append(found | {n: p.grad for n, p in routers.items()})
    ours, theirs = results
    assert ("aux_loss" in ours) is (name in ("mixtral", "qwen3_moe"))
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert expected.abs().max() > 0, key
        near(ours[key].detach(), expected.detach())


@models
def test_generation_is_that_of_eager(name: str) -> None:
    model = quantised(name)
    other = eager(model)
    for ids in (IDS, IDS[:1, :3]):
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), other.generate(ids, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_in_16_bits_it_is_as_near_to_float32_as_eager(name: str, dtype: torch.dtype) -> None:
    model = quantised(name)
    with torch.no_grad():
        exact = model(IDS).logits
        half = model.to(dtype)
        ours = half(IDS).logits
        theirs = eager(half)(IDS).logits
    assert ours.dtype == dtype
    error, allowed = ((t.float() - exact).norm() for t in (ours, theirs))
    assert 0 < error <= 1.5 * allowed


@models
def test_only_the_rows_of_chosen_experts_are_computed(name: str) -> None:
    """Of a model whose every token comes to every expert, too, most of them times zero."""
    model = quantised(name)
    chosen = model.config.num_experts_per_tok
    seen: list[int] = []
    for module in experts_of(model).values():
        module.register_forward_pre_hook(lambda _, args: seen.append(int(args[1][-1])))
    with torch.no_grad():
        model(IDS)
    assert seen == [IDS.numel() * chosen] * len(experts_of(model))


def test_a_module_whose_forward_was_replaced_gets_its_own_back() -> None:
    model = quantised("llama4")
    module = model.model.layers[0].feed_forward.experts
    assert "forward" in vars(module)
    qnn.dequantize_model(model)
    assert "forward" not in vars(module)


@models
def test_copies_compute_with_their_own_weights(name: str) -> None:
    model = quantised(name)
    # Before a call: what notes routers' logits then cannot be pickled.
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        expected = model(IDS).logits
        for other in copies:
            assert torch.equal(other(IDS).logits, expected)
            for module in experts_of(other).values():
                module.absmax.zero_()
                module.nested_offset.zero_()
            assert not torch.equal(other(IDS).logits, expected)
            assert torch.equal(model(IDS).logits, expected)


@models
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_fills_another_model(name: str, assign: bool) -> None:
    model = quantised(name)
    state = model.state_dict()
    assert not any(".experts." in n and t.dim() == 3 for n, t in state.items())
    torch.manual_seed(1)
    if assign:
        with torch.device("meta"):
            other = type(model)(copy.deepcopy(model.config))
        other = qnn.quantize_model(other.eval(), block_size=32)
        buffers = dict(model.named_buffers())
        other.load_state_dict(state, assign=True)
        for path, buffer in other.named_buffers():  # not all are in a state dict
            if buffer.is_meta:
                parent, _, last = path.rpartition(".")
                setattr(other.get_submodule(parent), last, buffers[path])
    else:
        other = qnn.quantize_model(type(model)(model.config).eval(), block_size=32)
        other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.fixture
def layer() -> tuple[Any, Any]:
    """The experts of one layer, and the same by eager."""
    model = quantised("qwen3_moe")
    return model.model.layers[0].mlp.experts, eager(model).model.layers[0].mlp.experts


def test_tokens_of_no_expert_add_nothing(layer: tuple[Any, Any]) -> None:
    """The index that is the number of experts, as expert parallelism gives it."""
    x = torch.randn(6, 64)
    index = torch.tensor([[0, 8], [8, 8], [7, 3], [8, 3], [3, 0], [5, 8]])
    weights = torch.rand(6, 2)
    results = []
    for experts in layer:
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = experts(given[0], index, given[1])
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), given)))
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs)
    y, dx, dweights = results[0]
    assert (y[1] == 0).all()
    assert (dx[1] == 0).all()
    assert (dweights[index == 8] == 0).all()
    none = torch.full((6, 2), 8)
    assert (layer[0](x, none, weights) == 0).all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_none_or_one_token(layer: tuple[Any, Any], tokens: int) -> None:
    x, index = torch.randn(tokens, 64), torch.tensor([[3, 3]])[:tokens]
    weights = torch.rand(tokens, 2)
    ours, theirs = (experts(x, index, weights) for experts in layer)
    assert ours.shape == (tokens, 64)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("wrong", "said"), [(-1, "-1 to 3"), (9, "2 to 9")])
def test_a_wrong_index_is_refused(layer: tuple[Any, Any], wrong: int, said: str) -> None:
    index = torch.tensor([[2, wrong], [3, 2]])
    message = f"top_k_index: got experts from {said}; takes 0 to 7, or 8 for none"
    with pytest.raises(ValueError, match=f"^{message}$"):
        layer[0](torch.randn(2, 64), index, torch.rand(2, 2))


def test_compiled_in_one_graph(layer: tuple[Any, Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer[0], fullgraph=True, backend="aot_eager")
    x, weights = torch.randn(6, 64), torch.rand(6, 2)
    index = torch.tensor([[0, 8], [8, 8], [7, 3], [8, 3], [3, 0], [5, 8]])
    results = []
    for experts in (compiled, layer[1]):
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = experts(given[0], index, given[1])
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), given)))
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs)


def test_eager_code_of_transformers_reads_4_bits_too() -> None:
    """Slowly, expert by expert, where a user asks for it."""
    model = quantised()
    other = copy.deepcopy(model)
    other.set_experts_implementation("eager")
    with torch.no_grad():
        near(other(IDS).logits, model(IDS).logits)
