"""`Weight`: which forms of its tensors are canonical, and what makes the others so."""

from __future__ import annotations

import pytest
import torch

import qkern
from qkern import testing
from qkern.weight import Weight


def weight(double_quant: bool) -> Weight:
    codebook = torch.linspace(-1, 1, 16)
    w = torch.randn(37, 130)
    return qkern.quantize_4bit(w, "custom", 64, double_quant, codebook=codebook).weight


def other_forms(weight: Weight) -> dict[str, Weight]:
    """The same weight with one tensor at a time as modules and bitsandbytes keep it."""
    forms = {"packed": weight._replace(packed=weight.packed.view(-1, 1))}
    for name in ("absmax", "nested_absmax", "nested_offset", "codebook"):
        tensor = getattr(weight, name)
        if tensor is not None and tensor.is_floating_point():
            forms[name] = weight._replace(**{name: tensor.view(torch.int32)})
    if weight.nested_offset is not None:
        forms["offset of [1]"] = weight._replace(nested_offset=weight.nested_offset.view(1))
    return forms


@pytest.mark.parametrize("double_quant", [False, True])
def test_any_one_tensor_in_another_form(double_quant: bool) -> None:
    plain = weight(double_quant)
    x = torch.randn(3, 130)
    expected = torch.ops.qkern.linear_4bit(x, *plain, 37, None, False)
    assert plain.is_canonical() is True
    forms = other_forms(plain)
    assert len(forms) == (5 if double_quant else 3)
    for name, other in forms.items():
        assert other.is_canonical() is False, name
        made = other.canonical()
        assert made.is_canonical(), name
        for own, same in zip(made.tensors, plain.tensors, strict=True):
            assert (own is None) == (same is None)
            if own is not None:
                testing.assert_bitwise(own, same)
                assert own.data_ptr() == same.data_ptr(), "the memory is the same"
        y = torch.ops.qkern.linear_4bit(x, *other, 37, None, False)
        testing.assert_bitwise(y, expected)


def test_nested_scales_without_their_offset_are_not_canonical() -> None:
    assert weight(True)._replace(nested_offset=None).is_canonical() is False
