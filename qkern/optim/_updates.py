"""What one step of AdamW does: which parameters, by which factors, in which calls of the op."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkern import ops, reference
from qkern.optim._moments import Moments
from qkern.optim._options import is_integer

Update = tuple[int, dict[str, Any], Tensor, Tensor]
"""A parameter's number, its group, itself and its gradient."""


def collect(groups: Sequence[dict[str, Any]]) -> list[Update]:
    """The parameters with a gradient, in order."""
    updates = []
    index = 0
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                _check_grad(param, param.grad)
                updates.append((index, group, param, param.grad))
            index += 1
    return updates


def _check_grad(param: Tensor, grad: Tensor) -> None:
    if is_integer(param):
        raise TypeError(f"grad: got one of a {param.dtype} parameter; takes none of integers")
    if grad.layout is not torch.strided:
        raise TypeError("grad: got a sparse tensor; takes a dense one")
    if grad.dtype != param.dtype:
        raise TypeError(f"grad: got {grad.dtype}; takes {param.dtype}, as the parameter has")


def by_device(updates: Sequence[Update]) -> dict[torch.device, list[Update]]:
    """The same updates, those of each device together."""
    found = defaultdict(list)
    for update in updates:
        found[update[2].device].append(update)
    return found


def counted(steps: Sequence[Tensor], skip: float | Tensor) -> Sequence[Tensor]:
    """Step counters of one device after a step, which does not count where ``skip`` is 1."""
    if steps[0].device.type == "cuda":
        return torch._foreach_add(list(steps), 1 - skip)
    # All at once: one by one they would take as long as a small model's update.
    return torch.stack(list(steps)).add_(1 - skip).unbind()


def device_of_steps(device: torch.device) -> torch.device:
    """Device holding the step counter of a parameter on ``device``.

    With it on a GPU, so that no step waits for the host and may be in a CUDA graph.
    """
    return device if device.type == "cuda" else torch.device("cpu")


def number(value: float, device: torch.device) -> Tensor:
    """A float32 tensor of one number, whatever torch's default dtype and device are."""
    return torch.full((), value, dtype=torch.float32, device=device)


def skipped(found_inf: Tensor | None, device: torch.device) -> float | Tensor:
    """1 where ``GradScaler`` found a gradient that is not finite, else 0."""
    if found_inf is None:
        return 0.0
    return found_inf.to(device_of_steps(device), torch.float32).reshape(())


def factors(
    groups: Sequence[dict[str, Any]],
    steps: Mapping[int, Tensor],
    scale: float | Tensor,
    skip: float | Tensor,
    device: torch.device,
) -> Tensor:
    """Factors for calls of the op on ``device``: a row for each parameter, by its number.

    Args:
        groups: Of all parameters.
        steps: Step counters after the step, of the parameters that take part.
        scale: What gradients are to be multiplied by.
        skip: 1 where nothing is to change, else 0.
        device: Where the parameters are.
    """
    any_step = next(iter(steps.values()))  # for rows that nobody reads
    tables = []
    first = 0
    for group in groups:
        numbers = range(first, first + len(group["params"]))
        first = numbers.stop
        if numbers:
            lr = group["lr"]
            tables.append(
                reference.adamw_factors(
                    torch.stack([steps.get(number, any_step) for number in numbers]),
                    lr if isinstance(lr, Tensor) else _finite("lr", lr),
                    _finite("betas", group["betas"][0]),
                    _finite("betas", group["betas"][1]),
                    _finite("eps", group["eps"]),
                    _finite("weight_decay", group["weight_decay"]),
                    -scale if group["maximize"] else scale,
                    skip,
                )
            )
    return (tables[0] if len(tables) == 1 else torch.cat(tables)).to(device)


def _finite(name: str, value: float) -> float:
    """One of Python's numbers, which torch takes and NumPy's not.

    A scheduler may have set it to what the optimizer's constructor refuses.
    """
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}; takes a finite number")
    return value


class Calls:
    """Updates gathered into one call of the op for each device and width of moments.

    ``done`` is called after each with the numbers of the parameters that it has updated.
    """

    def __init__(
        self,
        factors: Mapping[torch.device, Tensor],
        seed: int | None,
        done: Callable[[Sequence[int]], object] = lambda numbers: None,
    ) -> None:
        self._factors, self._seed, self._done = factors, seed, done
        self._found: defaultdict[Any, list[tuple[Any, ...]]] = defaultdict(list)

    def add(self, index: int, first: int, param: Tensor, grad: Tensor, moments: Moments) -> None:
        """One parameter or piece of one, contiguous, with its number and first element."""
        if param.numel():
            piece = (param, grad.contiguous(), moments, index, first)
            self._found[param.device, moments.bits].append(piece)

    def run(self) -> None:
        """Make the calls."""
        for (device, bits), pieces in self._found.items():
            params, grads, moments, indices, offsets = zip(*pieces, strict=True)
            scales = [m.absmaxes() for m in moments if bits == 8]
            ops.adamw_step(
                params,
                grads,
                [m.exp_avg for m in moments],
                [m.exp_avg_sq for m in moments],
                [of_exp_avg for of_exp_avg, _ in scales],
                [of_exp_avg_sq for _, of_exp_avg_sq in scales],
                self._factors[device],
                self._seed,
                indices,
                offsets,
            )
            self._done(indices)
