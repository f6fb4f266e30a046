"""`linear_cross_entropy` against plain cross entropy in float64, and how much it holds."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qkern
from qkern import loss as module
from qkern import testing
from tests.observers import Ops

VOCABULARY, FEATURES = 1000, 64
IGNORE = -100
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.5}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0}],
    ids=["plain", "scale", "softcap", "both"],
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=testing.DTYPE_NAMES.get
)
# Of the largest value: logits and gradients of 16 bits are rounded a few times.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows at a time or less, and 300 columns, so that the last ones are fewer."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * VOCABULARY * 7)
    monkeypatch.setattr(module, "_COLUMNS", 300)


def head(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(VOCABULARY, FEATURES) * 0.3).to(dtype)


def labels_of(*shape: int) -> Tensor:
    found = torch.randint(VOCABULARY, shape)
    found.view(-1)[: found.numel() // 3] = IGNORE
    return found


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)
    return losses.view(labels.shape) if reduction == "none" else losses


def in_double(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max(), float(error)


@pytest.mark.usefixtures("_small_chunks")
@OPTIONS
@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_and_gradients(
    dtype: torch.dtype, reduction: str, options: dict[str, float]
) -> None:
    hidden = torch.randn(3, 11, FEATURES).to(dtype).requires_grad_()
    weight = head(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY).to(dtype).requires_grad_()
    labels = labels_of(3, 11)
    inputs = hidden, weight, bias
    found = qkern.linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, **options)
    assert found.dtype == torch.float32
    doubles = in_double(*inputs)
    expected = plain(*doubles[:2], labels, doubles[2], reduction=reduction, **options)
    assert_near(found, expected, TOLERANCE[dtype])
    above = torch.randn(found.shape)
    gradients = torch.autograd.grad(found, inputs, above)
    right = torch.autograd.grad(expected, doubles, above.double())
    for gradient, other, tensor in zip(gradients, right, inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_near(gradient, other, TOLERANCE[dtype])


@pytest.mark.usefixtures("_small_chunks")
@DTYPES
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_a_head_in_4_bits(dtype: torch.dtype, reduction: str, format: str) -> None:
    qw = qkern.quantize_4bit(head(dtype), format=format)
    hidden = torch.randn(17, FEATURES).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY).to(dtype)
    labels = labels_of(17)
    found = qkern.linear_cross_entropy(hidden, qw, labels, bias, reduction=reduction)
    weight = qkern.dequantize_4bit(qw, torch.float32)
    doubles = in_double(hidden, weight, bias)
    expected = plain(*doubles[:2], labels, doubles[2], reduction=reduction)
    assert_near(found, expected, TOLERANCE[dtype])
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (right,) = torch.autograd.grad(expected.sum(), doubles[0])
    assert_near(gradient, right, TOLERANCE[dtype])


@pytest.mark.parametrize("needed", [0, 1, 2, None])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_requires_grad_gets_one(needed: int | None, reduction: str) -> None:
    tensors = [torch.randn(5, FEATURES), head(), torch.randn(VOCABULARY)]
    if needed is not None:
        tensors[needed].requires_grad_()
    hidden, weight, bias = tensors
    labels = labels_of(5)
    found = qkern.linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    assert found.requires_grad == (needed is not None)
    if needed is None:
        return
    found.sum().backward()
    doubles = in_double(*tensors)
    plain(*doubles[:2], labels, doubles[2], reduction=reduction).sum().backward()
    for index, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (index == needed)
        if tensor.grad is not None:
            assert_near(tensor.grad, doubles[index].grad, TOLERANCE[torch.float32])


def test_large_logits_neither_overflow_nor_lose_a_small_loss() -> None:
    weight = torch.eye(FEATURES) * 1e4
    hidden = torch.eye(FEATURES)[:3]
    found = qkern.linear_cross_entropy(hidden, weight, torch.tensor([0, 5, 2]), reduction="none")
    assert found.tolist() == [0.0, 1e4, 0.0]


def test_16_bits_have_room_for_a_row_of_equal_logits() -> None:
    """The sum of its exponentials is the vocabulary, which float16 has no number for."""
    vocabulary = 70_000
    hidden = torch.zeros(2, 8, dtype=torch.float16).requires_grad_()
    weight = torch.randn(vocabulary, 8).half()
    found = qkern.linear_cross_entropy(hidden, weight, torch.tensor([3, 69_999]), reduction="sum")
    found.backward()
    assert found.item() == pytest.approx(2 * torch.log(torch.tensor(vocabulary * 1.0)).item())
    expected = weight.float().mean(0) - weight[[3, 69_999]].float()
    torch.testing.assert_close(hidden.grad.float(), expected, rtol=1e-2, atol=1e-2)


def test_strided_and_broadcast_inputs() -> None:
    weight = head().t().contiguous().t()
    hidden = torch.randn(FEATURES, 6).t()
    labels = torch.tensor(7).expand(6)
    found = qkern.linear_cross_entropy(hidden, weight, labels)
    assert_near(found, plain(hidden.double(), weight.double(), labels), 1e-6)
    same = torch.randn(FEATURES).expand(4, FEATURES)
    found = qkern.linear_cross_entropy(same, weight, labels[:4], reduction="none")
    assert found.unique().numel() == 1


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(*shape, FEATURES).requires_grad_()
    weight = head().requires_grad_()
    labels = torch.empty(shape, dtype=torch.int64)
    assert qkern.linear_cross_entropy(hidden, weight, labels).isnan()
    found = qkern.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert found.item() == 0.0
    found.backward()
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()
    losses = qkern.linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert losses.shape == shape


def test_all_ignored() -> None:
    hidden = torch.randn(4, FEATURES).requires_grad_()
    labels = torch.full((4,), -1)
    found = qkern.linear_cross_entropy(hidden, head(), labels, ignore_index=-1)
    assert found.isnan()  # as plain cross entropy has it
    found = qkern.linear_cross_entropy(hidden, head(), labels, ignore_index=-1, reduction="sum")
    found.backward()
    assert found.item() == 0.0
    assert not hidden.grad.any()


def test_a_class_may_be_ignored() -> None:
    labels = torch.tensor([0, 3, 0, 5])
    hidden, weight = torch.randn(4, FEATURES), head()
    found = qkern.linear_cross_entropy(hidden, weight, labels, ignore_index=0, reduction="none")
    expected = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=0, reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("_small_chunks")
def test_a_nan_reaches_loss_and_gradient() -> None:
    hidden = torch.randn(3, FEATURES)
    hidden[1, 2] = torch.nan
    hidden.requires_grad_()
    losses = qkern.linear_cross_entropy(hidden, head(), torch.arange(3), reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    losses.sum().backward()
    assert hidden.grad.isnan().all(1).tolist() == [False, True, False]


class Largest(TorchDispatchMode):
    """The largest storage that an op gives, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.found = max(self.found, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("in_4_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_never_all_there(dtype: torch.dtype, in_4_bits: bool) -> None:
    rows, vocabulary = 300, 70_001  # 84 MB in float32
    dense = torch.randn(vocabulary, 32).to(dtype)
    weight = qkern.quantize_4bit(dense) if in_4_bits else dense
    hidden = torch.randn(rows, 32).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (rows,))
    with Largest() as largest:
        qkern.linear_cross_entropy(hidden, weight, labels).backward()
    assert 30 << 20 < largest.found < 60 << 20


def test_under_autocast_it_is_the_product_of_16_bits() -> None:
    hidden, weight = torch.randn(5, FEATURES).requires_grad_(), head().requires_grad_()
    bias = torch.randn(VOCABULARY)
    labels = labels_of(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = qkern.linear_cross_entropy(hidden, weight, labels, bias)
        losses = qkern.linear_cross_entropy(hidden, weight, labels, bias, reduction="none")
    halves = hidden.bfloat16(), weight.bfloat16(), labels, bias.bfloat16()
    expected = qkern.linear_cross_entropy(*halves)
    testing.assert_bitwise(found, expected)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(torch.autograd.grad(found, (hidden, weight)), gradients, strict=True):
            testing.assert_bitwise(one, other)
        losses.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert_near(hidden.grad / (labels != IGNORE).sum(), gradients[0].double(), 1e-2)


def test_compiled_it_gives_the_same() -> None:
    hidden, weight = torch.randn(9, FEATURES).requires_grad_(), head()
    labels = labels_of(9)

    def step(hidden: Tensor, labels: Tensor) -> Tensor:
        return qkern.linear_cross_entropy(hidden, weight, labels, softcap=9.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(hidden, labels)
    found = compiled(hidden, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden)
    )


def test_gradients_are_not_differentiated_again() -> None:
    hidden = torch.randn(3, FEATURES).requires_grad_()
    loss = qkern.linear_cross_entropy(hidden, head(), torch.arange(3))
    with pytest.raises(RuntimeError, match="create_graph=True; its gradients cannot be"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_label_that_is_no_class_is_named() -> None:
    for label in (VOCABULARY, -1):
        labels = torch.tensor([0, 1, label, 2])
        with pytest.raises(IndexError, match=f"^labels: got {label}; takes 0 to 999, or ignore"):
            qkern.linear_cross_entropy(torch.randn(4, FEATURES), head(), labels)
        # Where labels are not looked at beforehand, it does not count as another class either.
        with torch.device("cpu"), pytest.raises((IndexError, RuntimeError)):
            qkern.linear_cross_entropy(torch.randn(4, FEATURES), head(), labels)


def test_sums_over_many_rows_do_not_overflow_in_float16() -> None:
    """The mean of 4,096 rows of 20 is 20, and their sum more than float16 has."""
    hidden = torch.full((4096, 8), 20.0).half()
    weight = torch.randn(50, 8).half()
    weight[3] = -1
    weight.requires_grad_()
    qkern.linear_cross_entropy(hidden, weight, torch.full((4096,), 3)).backward()
    assert weight.grad[3].tolist() == pytest.approx([-20.0] * 8, rel=1e-2)


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_small_factors_from_above_leave_small_probabilities(in_4_bits: bool) -> None:
    """In float16, probabilities of 1e-5 times 1e-3 would be no numbers any more."""
    vocabulary = 100_000
    dense = (torch.randn(vocabulary, FEATURES) * 0.1 + 0.5).half()
    weight = qkern.quantize_4bit(dense) if in_4_bits else dense
    hidden = (torch.randn(3, FEATURES) * 1e-3).half().requires_grad_()
    losses = qkern.linear_cross_entropy(hidden, weight, torch.arange(3), reduction="none")
    (found,) = torch.autograd.grad((losses * 1e-3).sum(), hidden)
    total = qkern.linear_cross_entropy(hidden, weight, torch.arange(3), reduction="sum")
    (expected,) = torch.autograd.grad(total, hidden)
    assert_near(found * 1e3, expected.double(), 1e-2)


def test_a_batch_without_labels_leaves_no_nan_in_a_trained_head() -> None:
    weight, bias = head().requires_grad_(), torch.randn(VOCABULARY).requires_grad_()
    labels = torch.full((4,), IGNORE)
    loss = qkern.linear_cross_entropy(torch.randn(4, FEATURES), weight, labels, bias)
    assert loss.isnan()
    loss.backward()
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_what_comes_from_above_to_an_ignored_row_does_not_count() -> None:
    weight = head().requires_grad_()
    labels = torch.tensor([3, IGNORE])
    with torch.device("cpu"):  # a mode, under which ignored rows are not left out
        losses = qkern.linear_cross_entropy(
            torch.randn(2, FEATURES), weight, labels, reduction="none"
        )
    losses.backward(torch.tensor([1.0, torch.nan]))
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


def test_a_small_loss_of_large_logits_keeps_its_digits() -> None:
    logits = torch.tensor([[1000.0, 990.0]])
    found = qkern.linear_cross_entropy(torch.ones(1, 1), logits.t().contiguous(), torch.tensor([0]))
    expected = F.cross_entropy(logits.double(), torch.tensor([0])).item()
    assert found.item() == pytest.approx(expected, rel=1e-3)


class Live(TorchDispatchMode):
    """Bytes of storages of 1 MiB and more that ops made and that are there at once, at most."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.storages: dict[int, Any] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if storage.nbytes() >= 1 << 20 and storage._cdata not in self.before:
                self.storages[storage._cdata] = weakref.ref(storage), storage.nbytes()
        self.storages = {k: v for k, v in self.storages.items() if v[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_is_there_at_a_time(
    dtype: torch.dtype, reduction: str, softcap: float | None
) -> None:
    vocabulary = 131_072
    weight = torch.randn(vocabulary, 16).to(dtype)
    hidden = torch.randn(300, 16).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (300,))
    with Live(weight) as live:
        losses = qkern.linear_cross_entropy(
            hidden, weight, labels, reduction=reduction, softcap=softcap
        )
        losses.sum().backward()
    assert 20 << 20 < live.most < 64 << 20


def test_without_gradients_none_is_made() -> None:
    hidden, weight = torch.randn(9, FEATURES).requires_grad_(), head().requires_grad_()
    with torch.no_grad(), Ops() as ops:
        qkern.linear_cross_entropy(hidden, weight, labels_of(9))
    assert not any("addmm" in name or "zeros" in name for name in ops.seen)


def test_on_meta_it_has_shapes() -> None:
    hidden = torch.empty(3, FEATURES, device="meta", requires_grad=True)
    labels = torch.empty(3, dtype=torch.int64, device="meta")
    loss = qkern.linear_cross_entropy(hidden, head().to("meta"), labels)
    loss.backward()
    assert loss.is_meta
    assert hidden.grad.is_meta


def test_a_weight_without_features_gives_uniform_losses() -> None:
    losses = qkern.linear_cross_entropy(torch.ones(2, 0), torch.ones(5, 0), torch.tensor([1, 4]))
    assert losses.item() == pytest.approx(math.log(5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(4, 3)}, ValueError, r"^weight: got shape \[1000, 64\]; takes \["),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"^hidden: got shape \[\]"),
        ({"hidden": torch.ones(4, 64).double()}, TypeError, "^hidden: got torch.float64"),
        ({"hidden": [1]}, TypeError, "^hidden: got list"),
        ({"weight": torch.ones(1000, 64).half()}, TypeError, "^weight: got torch.float16; takes"),
        ({"weight": torch.ones(64)}, ValueError, r"^weight: got shape \[64\]"),
        ({"weight": torch.ones(0, 64)}, ValueError, r"^weight: got shape \[0, 64\]"),
        ({"weight": None}, TypeError, "^weight: got NoneType"),
        ({"labels": torch.arange(4).int()}, TypeError, "^labels: got torch.int32; takes"),
        ({"labels": torch.arange(5)}, ValueError, r"^labels: got shape \[5\]; takes \[4\]"),
        ({"bias": torch.ones(64)}, ValueError, r"^bias: got shape \[64\]; takes \[1000\]"),
        ({"bias": torch.ones(1000).half()}, TypeError, "^bias: got torch.float16; takes"),
        ({"labels": torch.arange(4, device="meta")}, ValueError, "^labels: got a tensor on meta"),
        ({"reduction": "max"}, ValueError, "^reduction: got 'max'; takes one of mean, sum, none"),
        ({"softcap": 0}, ValueError, "^softcap: got 0; takes a number above 0"),
        ({"softcap": math.inf}, ValueError, "^softcap: got inf; takes a finite number"),
        ({"scale": math.nan}, ValueError, "^scale: got nan; takes a finite number"),
        ({"ignore_index": 1 << 70}, ValueError, "^ignore_index: got 1180591620717411303424; takes"),
        ({"labels": torch.arange(4).to_sparse()}, TypeError, "^labels: got layout torch.sparse"),
        ({"softcap": "5"}, TypeError, "^softcap: got str; takes a number"),
        ({"scale": None}, TypeError, "^scale: got NoneType; takes a number"),
        ({"ignore_index": 1.0}, TypeError, "^ignore_index: got float; takes an int"),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    right = {
        "hidden": torch.randn(4, FEATURES),
        "weight": head(),
        "labels": torch.arange(4),
        "bias": None,
    }
    with pytest.raises(error, match=message):
        qkern.linear_cross_entropy(**right | change)
