"""Parameter groups of a model, with options by the parameters' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from qkern import _errors
from qkern.optim._options import check_options

DEFAULTS: Mapping[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "bits": 32,
    "maximize": False,
}
"""The options that a group may have, as :class:`qkern.optim.PagedAdamW` has them by default."""


def parameter_groups(
    model: nn.Module, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` as groups for an optimizer, with options by name.

    Args:
        model: its parameters that require grad are taken, each once.
        overrides: options by a regular expression, which is searched for in a parameter's name, as
            ``named_parameters`` has it: ``{"lora_B": {"lr": 2e-3}, "norm|bias": {"weight_decay":
            0.0}, "lm_head": {"bits": 32}}``. Options are those that groups of
            :class:`qkern.optim.PagedAdamW` have: lr, betas, eps, weight_decay, bits, maximize.
            Where several match, all count, and for one option the last.

    Returns:
        groups, in the order of their first parameters. What has no options of its own is in a
        group without any, which takes the optimizer's.

    Raises:
        TypeError, ValueError: An expression or an option is wrong, or an expression matches no
            trained parameter; the message begins with the expression.
    """
    overrides = {} if overrides is None else overrides
    patterns = {key: _compiled(key, options) for key, options in overrides.items()}
    unmatched = dict.fromkeys(patterns)
    found: dict[tuple[tuple[str, Any], ...], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        options: dict[str, Any] = {}
        for key, pattern in patterns.items():
            if pattern.search(name):
                options |= overrides[key]
                unmatched.pop(key, None)
        held = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        found.setdefault(tuple(sorted(held.items())), []).append(parameter)
    if unmatched:
        raise ValueError(f"overrides: {next(iter(unmatched))!r} matches no trained parameter")
    return [{"params": parameters, **dict(options)} for options, parameters in found.items()]


def _compiled(key: Any, options: Any) -> re.Pattern[str]:
    if not isinstance(key, str):
        raise TypeError(f"overrides: got a {_errors.type_name(key)} as a name; takes a str")
    try:
        pattern = re.compile(key)
    except re.error as error:
        raise ValueError(f"overrides: {key!r} is no regular expression: {error}") from None
    if not isinstance(options, Mapping):
        raise TypeError(f"overrides: {key!r}: got {_errors.type_name(options)}; takes a mapping")
    for option in options:
        if option not in DEFAULTS:
            takes = ", ".join(DEFAULTS)
            raise ValueError(f"overrides: {key!r}: got {option!r}; takes {takes}")
    check_options({**DEFAULTS, **options}, f"overrides: {key!r}: ")
    return pattern
