"""A layer without hooks costs no search for any, yet has one where they are counted."""

from __future__ import annotations

from qkern import nn as qnn


def test_no_hooks_are_false_and_of_length_one() -> None:
    hooks = qnn.Linear4bit(64, 32)._forward_pre_hooks
    assert not hooks
    assert len(hooks) == 1
    assert list(hooks) == []


def test_a_hook_is_true_until_it_is_removed() -> None:
    layer = qnn.Linear4bit(64, 32)
    hooks = layer._forward_pre_hooks
    handle = layer.register_forward_pre_hook(lambda *_: None)
    assert hooks
    assert len(hooks) == 2
    handle.remove()
    assert not hooks
    assert len(hooks) == 1
