"""Modules of transformers that keep experts in tensors of three dimensions, and their forward.

transformers 5 says of such a module how its tensors lie (``use_experts_implementation``) and looks
its forward up by name in a table, where ours is ``"qkern"``. So any of its models can have experts
in 4 bits. Llama 4's say nothing, and get a forward of their own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkern.nn._adapters import has_own_forward
from qkern.nn._sources import class_name, is_linear, is_only_placed
from qkern.nn.experts import Experts4bit

IMPLEMENTATION = "qkern"
"""The name of `experts_forward` in transformers' table."""

_LLAMA4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"
_NAMES = ("gate_up_proj", "up_proj", "down_proj")


class Stack(NamedTuple):
    """A tensor ``[E, out, in]`` of experts, or ``[E, in, out]`` where it is transposed."""

    module: nn.Module
    path: str
    """The module's."""
    name: str
    """The tensor's, in the module."""
    transposed: bool

    @property
    def whole_name(self) -> str:
        """The tensor's name in the model."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def parameter(self) -> nn.Parameter | None:
        """The dense tensor, None where it is something else by now."""
        return self.module._parameters.get(self.name)


def stacks(model: nn.Module) -> Iterator[Stack]:
    """The dense tensors of experts in ``model`` that can be in 4 bits."""
    for path, module in model.named_modules():
        transposed = _transposed(module)
        if transposed is None:
            continue
        # In the module's own order, by which PEFT's files go.
        for name, parameter in list(module._parameters.items()):
            if name in _NAMES and parameter is not None and parameter.dim() == 3:
                yield Stack(module, path, name, transposed)


def routers(model: nn.Module) -> Iterator[str]:
    """The paths of linear layers that choose among experts, in a tensor or a list, beside them."""
    for path, experts in model.named_modules():
        parent, _, name = path.rpartition(".")
        if _transposed(experts) is not None:
            count = experts.num_experts
        elif isinstance(experts, nn.ModuleList | nn.ModuleDict) and name == "experts":
            count = len(experts)
        else:
            continue
        for child in ("gate", "router"):
            inside = getattr(model.get_submodule(parent), child, None)
            # Of a module of its own, whatever the layer in it is called.
            for below, layer in inside.named_modules() if isinstance(inside, nn.Module) else ():
                # As wide as there are experts: a gate of another kind has one column, or many.
                if is_linear(layer) and layer.out_features == count:
                    yield ".".join(part for part in (parent, child, below) if part)


def check_stack(model: nn.Module, stack: Stack) -> None:
    """ValueError where something would be lost with the dense tensor."""
    tensor, module = stack.parameter, stack.module
    assert tensor is not None
    reason = None
    if type(tensor) is not nn.Parameter:
        reason = f"is a {type(tensor).__name__}; takes a plain parameter"
    elif getattr(module, "parametrizations", None) is not None:
        reason = "is computed (parametrisations); remove them first"
    elif _has_strange_forward(module):
        reason = "has a forward of its own around it, which would be lost; remove it, or skip it"
    elif len(tensor) != module.num_experts:
        reason = f"has {len(tensor)} experts; takes {module.num_experts}, the module's num_experts"
    else:
        for path, other in model.named_modules():
            held = other._parameters.items() if other is not module else ()
            if any(parameter is tensor for _, parameter in held):
                reason = f"is also a parameter of {path}; skip it"
    if reason is not None:
        raise ValueError(f"{stack.whole_name}: {reason}")


def _has_strange_forward(module: nn.Module) -> bool:
    """Whether somebody put another ``forward`` on it, which `use_4_bits` did not."""
    found = vars(module).get("forward")
    ours = isinstance(found, functools.partial) and found.func is _llama4_forward
    return has_own_forward(module) and not ours and not is_only_placed(module)


def _transposed(module: nn.Module) -> bool | None:
    """Whether a module of experts multiplies by the matrices as they lie; None of another one."""
    if class_name(module) == _LLAMA4:
        return True
    found = vars(module).get("is_transposed")
    is_known = isinstance(found, bool) and hasattr(type(module), "_apply_gate")
    return found if is_known else None


def quantized(stack: Stack, *options: Any, **others: Any) -> Experts4bit:
    """The tensor in 4 bits; the options are those of `Experts4bit.from_dense`."""
    tensor = stack.parameter
    assert tensor is not None
    others["transposed"] = stack.transposed
    experts = Experts4bit.from_dense(tensor.detach(), *options, **others)
    return experts.train(stack.module.training)


def use_4_bits(stack: Stack, experts: Experts4bit) -> None:
    """Put ``experts`` in the place of the dense tensor, and have the module compute with them."""
    module = stack.module
    delattr(module, stack.name)
    module.add_module(stack.name, experts)
    if class_name(module) == _LLAMA4:
        # Not a bound method, which pickle would look for in the module's class.
        module.forward = functools.partial(_llama4_forward, module)
    else:
        register()
        config: Any = module.config
        if config._experts_implementation != IMPLEMENTATION:
            experts.implementation_before = config._experts_implementation
        config._experts_implementation = IMPLEMENTATION


def quantized_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Experts4bit]]:
    """The path of each `Experts4bit` that `use_4_bits` put somewhere, its module, and itself."""
    for path, module in model.named_modules():
        if _transposed(module) is not None:
            for name, child in module.named_children():
                if isinstance(child, Experts4bit):
                    yield f"{path}.{name}" if path else name, module, child


def use_dense(module: nn.Module, name: str, dense: nn.Parameter) -> None:
    """Put a dense tensor in the place of ``module``'s experts in 4 bits."""
    before = getattr(module, name).implementation_before
    delattr(module, name)
    module.register_parameter(name, dense)
    if before is not None:
        module.config._experts_implementation = before  # type: ignore[union-attr]
    if class_name(module) == _LLAMA4 and not any(
        isinstance(child, Experts4bit) for child in module.children()
    ):
        vars(module).pop("forward", None)


def register() -> None:
    """Enter `experts_forward` into transformers' table, if there is one."""
    library = sys.modules.get("transformers.integrations.moe")
    interface = getattr(library, "ALL_EXPERTS_FUNCTIONS", None)
    if interface is not None and IMPLEMENTATION not in interface:
        interface.register(IMPLEMENTATION, experts_forward)


class Routing(NamedTuple):
    """Which expert takes which token, in the order of experts."""

    order: Tensor
    """int64 ``[tokens * k]``: of the sorted pairs, the place among all, token by token."""
    offsets: Tensor
    """int64 ``[E]``: where the pairs of each expert end."""
    k: int

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> Routing:
        """The routing of ``top_k_index`` ``[tokens, k]``; pairs with expert E are of none.

        Raises ``ValueError`` for other numbers than 0 to E, which is looked at on a CPU only.
        """
        ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
        if ids.is_cpu and not torch.compiler.is_compiling() and ids.numel():
            low, high = int(ids[0]), int(ids[-1])
            if low < 0 or high > num_experts:
                raise ValueError(
                    f"top_k_index: got experts from {low} to {high}; takes 0 to {num_experts - 1}, "
                    f"or {num_experts} for none"
                )
        experts = torch.arange(num_experts, dtype=ids.dtype, device=ids.device)
        offsets = torch.searchsorted(ids, experts, right=True)
        return cls(order, offsets, top_k_index.shape[-1])

    def sorted(self, tokens: Tensor) -> Tensor:
        """Of each pair in order the token: ``[tokens, K] -> [tokens * k, K]``."""
        return tokens[self.order if self.k == 1 else self.order // self.k]

    def places(self) -> Tensor:
        """Of each pair, token by token, its place in order."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return places

    def summed(self, values: Tensor, weights: Tensor) -> Tensor:
        """Of each token the sum of its pairs' values times their ``weights`` ``[tokens, k]``."""
        pairs = values[self.places()].view(*weights.shape, values.shape[-1])
        return (pairs * weights[..., None]).sum(1)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of a module of experts, by transformers' table: each token by its k experts.

    ``hidden_states`` is ``[tokens, hidden]``, ``top_k_index`` and ``top_k_weights`` are
    ``[tokens, k]``; an index that is the number of experts is of none. Experts may be dense still.
    """
    routing = Routing.of(top_k_index, self.num_experts)
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    x = _product(self, up_name, routing.sorted(hidden_states), routing.offsets)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _product(self, "down_proj", x, routing.offsets)
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    return routing.summed(x, top_k_weights).to(hidden_states.dtype)


def _product(module: Any, name: str, x: Tensor, offsets: Tensor) -> Tensor:
    """``x`` by the experts of a module, in 4 bits or dense, with its bias for them if it has one.

    Rows of no expert give zeros.
    """
    experts = getattr(module, name)
    bias = getattr(module, f"{name}_bias", None)
    if isinstance(experts, nn.Module):
        y: Tensor = experts(x, offsets, bias=bias)
        return y
    begin, parts = 0, []
    for expert, end in enumerate(offsets.tolist()):
        weight = experts[expert] if _transposed(module) else experts[expert].mT
        part = x[begin:end].to(weight.dtype) @ weight
        parts.append(part if bias is None else part + bias[expert])
        begin = end
    parts.append(parts[0].new_zeros(len(x) - begin, parts[0].shape[1]))
    return torch.cat(parts)


def _llama4_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4's experts: every token comes to every expert, most of them times zero.

    Only rows that are not all zeros are computed. The others are zeros in the dense result too,
    and the gradient that they would get is multiplied by zero next.
    """
    experts = self.num_experts
    tokens = hidden_states.reshape(-1, self.hidden_size)
    expert = torch.arange(experts, device=tokens.device).repeat_interleave(len(tokens) // experts)
    index = torch.where((tokens != 0).any(-1), expert, experts)
    routing = Routing.of(index[:, None], experts)
    x = _product(self, "gate_up_proj", routing.sorted(tokens), routing.offsets)
    gate, up = x.chunk(2, dim=-1)
    values = _product(self, "down_proj", up * self.act_fn(gate), routing.offsets)
    return values[routing.places()]
