"""Every public name has a check that calls it, passes, and fails once the name is broken.

public_calls.py has the checks. A name without one fails here, and so does a check that only
mentions a name: each name is broken in each of `WAYS`, and one of its checks must notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkern import QuantizedExperts, QuantizedTensor, backends
from qkern import nn as qnn
from tests.suite.public_calls import CHECKS
from tools import api_page

# Poison is one of the things that are checked.
pytestmark = pytest.mark.unpoisoned

BASES = {
    "qkern.Stored": QuantizedTensor.__mro__[1],
    "qkern.nn.LoRALayer": qnn.LoRALinear.__mro__[1],
    "qkern.nn.QuantizedModule": qnn.Linear4bit.__mro__[1],
}
"""Classes that are no public names, but what public ones have in common."""


def public_names() -> Iterator[str]:
    """All functions and classes, and what the classes have of their own."""
    found: list[tuple[str, Any]] = list(BASES.items())
    for module_name in api_page.MODULES:
        module = importlib.import_module(module_name)
        found += [(f"{module_name}.{n}", getattr(module, n)) for n in api_page.public(module)]
    found += [(f"qkern.backends.{name}", getattr(backends, name)) for name in api_page.BACKENDS]
    for name, value in found:
        if inspect.isclass(value):
            fields = getattr(value, "__dataclass_fields__", {})
            members = (member for member, _ in api_page._own(value) if member not in fields)
            yield from (f"{name}.{member}" for member in members)
        if callable(value) and name not in BASES and not isinstance(value, types.GenericAlias):
            yield name


NAMES = sorted(public_names())


def zeroed(value: Any) -> Any:
    """A value of the same kind that says nothing."""
    match value:
        case Tensor():
            return torch.zeros_like(value)
        case QuantizedTensor() | QuantizedExperts():
            return dataclasses.replace(value, absmax=torch.zeros_like(value.absmax))
        case bool():
            return not value
        case int() | float() | str():
            return type(value)()
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*map(zeroed, value))
        case tuple() | list():
            return type(value)(map(zeroed, value))
        case dict():
            return {}
        case nn.Module():
            other = value  # the same, so that only what it computes is wrong
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            return other
        case Iterator():
            return iter(())
    return object()


def is_context(function: Callable[..., Any]) -> bool:
    return inspect.isgeneratorfunction(getattr(function, "__wrapped__", None))


def does_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    if is_context(function):
        return lambda *_, **__: contextlib.nullcontext()
    return lambda *arguments, **_: arguments[0] if arguments else None


def gives_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: zeroed(function(*arguments, **options))


def never_ends(function: Callable[..., Any]) -> Callable[..., Any]:
    """A context whose effect goes on after the block."""
    return contextlib.contextmanager(lambda *a, **o: forgotten(function(*a, **o)))


def forgotten(context: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
    left.append(context)
    yield context.__enter__()


left: list[contextlib.AbstractContextManager[Any]] = []
"""Contexts that are to be ended after the test."""

WAYS = {
    "does nothing": does_nothing,
    "gives nothing": gives_nothing,
}


def owner_of(name: str) -> tuple[Any, str]:
    """The module or class that a name is in, and what it is called there."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:count])
        if path in BASES:
            return BASES[path], parts[-1]
        with contextlib.suppress(ImportError):
            owner = importlib.import_module(path)
            for part in parts[count:-1]:
                owner = getattr(owner, part)
            return owner, parts[-1]
    raise AssertionError(name)


def broken(value: Any, way: Callable[..., Any]) -> Any:
    """What stands for a member of a class or a module once it is broken."""
    if isinstance(value, property):
        assert value.fget
        getter = value.fget
        return property(way(getter) if way is gives_nothing else lambda _: None)
    if isinstance(value, (classmethod, staticmethod)):
        return type(value)(way(value.__func__))
    return way(value)


def break_it(name: str, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute = owner_of(name)
    value = inspect.getattr_static(owner, attribute)
    if inspect.isclass(value):
        if issubclass(value, BaseException):
            monkeypatch.setattr(owner, attribute, KeyError)
        else:
            monkeypatch.setattr(value, "__init__", lambda *_, **__: None)
        return
    monkeypatch.setattr(owner, attribute, broken(value, way))


@pytest.fixture(autouse=True)
def _end_contexts() -> Iterator[None]:
    yield
    while left:
        left.pop().__exit__(None, None, None)


def test_every_public_name_has_a_check() -> None:
    assert set(CHECKS) == set(NAMES)


@pytest.mark.parametrize(
    "check", {check: None for all_ in CHECKS.values() for check in all_}, ids=lambda c: c.__name__
)
def test_the_check_passes(check: Callable[[], None]) -> None:
    check()


def noticed(name: str, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether one of the checks of a name fails while it is broken."""
    for check in CHECKS[name]:
        with monkeypatch.context() as patch:
            break_it(name, way, patch)
            try:
                check()
            except (Exception, pytest.fail.Exception):  # noqa: BLE001
                return True
    return False


def gives_anything(name: str) -> bool:
    owner, attribute = owner_of(name)
    value = inspect.getattr_static(owner, attribute)
    return not inspect.isfunction(value) or inspect.signature(value).return_annotation != "None"


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("way", WAYS)
def test_a_broken_name_is_noticed(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if WAYS[way] is gives_nothing and not gives_anything(name):
        return  # that is right
    assert noticed(name, WAYS[way], monkeypatch)


@pytest.mark.parametrize("name", ["qkern.batch_invariant", "qkern.nn.disable_lora"])
def test_a_context_that_does_not_end_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert noticed(name, never_ends, monkeypatch)


def test_a_mention_is_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "qkern.fp4_linear", [lambda: None])
    assert not noticed("qkern.fp4_linear", gives_nothing, monkeypatch)
