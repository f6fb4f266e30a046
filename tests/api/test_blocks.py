"""`qkern.batch_invariant` and `backends.use` hold for the code in their blocks and no other."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qkern
from qkern import backends, reference, testing
from qkern.backends import Backend, cpu
from qkern.functional import batch_invariant_now

needs_native = pytest.mark.skipif(cpu.missing_reason() is not None, reason="qkern._C is not built")


class Recording(Backend):
    """The reference, which notes its calls: the op, and whether its rows were to be invariant."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, bool | None]] = []

    def linear_4bit(self, *args: Any) -> Tensor:
        self.calls.append(("linear_4bit", args[4]))
        return reference.linear_4bit(*args)

    def linear_4bit_dx(self, *args: Any) -> Tensor:
        self.calls.append(("linear_4bit_dx", args[3]))
        return reference.linear_4bit_dx(*args)


OUTSIDE = Recording("outside")
FORWARD, BACKWARD = "linear_4bit", "linear_4bit_dx"


def in_force() -> tuple[bool | None, str]:
    return batch_invariant_now(), backends.selected_name()


BEFORE = (False, backends.selected_name())

Block = Callable[[], AbstractContextManager[None]]
BLOCKS: dict[str, tuple[Block, tuple[bool, str]]] = {
    "batch_invariant": (qkern.batch_invariant, (True, BEFORE[1])),
    "use": (lambda: backends.use(OUTSIDE), (False, "outside")),
}
if cpu.missing_reason() is None:
    BLOCKS["use_isa"] = (lambda: backends.use("cpu", isa="scalar"), (False, "cpu"))
blocks = pytest.mark.parametrize(("block", "inside"), BLOCKS.values(), ids=list(BLOCKS))


def state() -> tuple[Any, ...]:
    return (*in_force(), cpu.isa() if cpu.missing_reason() is None else None)


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def _all_is_over() -> Iterator[None]:
    before = state()
    yield
    assert state() == before
    assert in_thread(state) == before


@blocks
def test_a_block_holds_in_its_thread_alone(block: Block, inside: tuple[bool, str]) -> None:
    before = state()
    with block():
        assert in_force() == inside
        assert state() != before
        assert in_thread(state) == before
    assert state() == before


@blocks
def test_blocks_of_two_threads_that_overlap(block: Block, inside: tuple[bool, str]) -> None:
    """The first ends within the second: neither ends the other, and none stays."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen: dict[str, Any] = {}

    def first() -> None:
        with block():
            first_in.set()
            assert second_in.wait(60)
        seen["after the first"] = in_force()
        first_out.set()

    def second() -> None:
        assert first_in.wait(60)
        with block():
            second_in.set()
            assert first_out.wait(60)
            seen["in the second"] = in_force()
        seen["after the second"] = in_force()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {
        "after the first": BEFORE,
        "in the second": inside,
        "after the second": BEFORE,
    }


@blocks
def test_tasks_have_blocks_of_their_own(block: Block, inside: tuple[bool, str]) -> None:
    """They take turns in one thread; one that is made in a block starts in it."""

    async def within() -> list[Any]:
        with block():
            found = [in_force()]
            child = asyncio.create_task(without())
            await asyncio.sleep(0)
            found.append(in_force())
            found += await child
        return [*found, in_force()]

    async def without() -> list[Any]:
        found = [in_force()]
        await asyncio.sleep(0)
        return [*found, in_force()]

    async def both() -> list[list[Any]]:
        return await asyncio.gather(within(), without())

    first, second = asyncio.run(both())
    assert first == [inside, inside, inside, inside, BEFORE]
    assert second == [BEFORE, BEFORE]


@blocks
def test_blocks_that_end_out_of_order(block: Block, inside: tuple[bool, str]) -> None:
    """As those of two generators that are read in turn."""

    def reading() -> Iterator[None]:
        with block():
            yield

    first, second = reading(), reading()
    next(first)
    next(second)
    first.close()
    assert in_force() == inside
    second.close()
    assert in_force() == BEFORE


@blocks
def test_a_block_that_ends_in_another_thread(block: Block, inside: tuple[bool, str]) -> None:
    held, entered = ExitStack(), contextvars.copy_context()
    entered.run(held.enter_context, block())
    assert in_force() == BEFORE
    assert entered.run(in_force) == inside
    in_thread(held.close)
    assert in_force() == BEFORE
    assert entered.run(in_force) == BEFORE


@blocks
def test_exceptions_end_a_block(block: Block, inside: tuple[bool, str]) -> None:
    with pytest.raises(KeyError), block():
        raise KeyError
    assert in_force() == BEFORE


def test_nested_blocks() -> None:
    inner = Recording("inner")
    with qkern.batch_invariant(), backends.use(OUTSIDE):
        with qkern.batch_invariant(False), backends.use(inner):
            assert in_force() == (False, "inner")
        assert in_force() == (True, "outside")


@needs_native
def test_an_instruction_set_holds_in_inner_blocks() -> None:
    with backends.use("cpu", isa="scalar"):
        with backends.use("reference"), backends.use("cpu"):
            assert cpu.isa() == "scalar"
        assert cpu.isa() == "scalar"


@needs_native
def test_the_kernels_take_the_instruction_set_of_their_thread() -> None:
    """Results of a matmul tell the instruction sets apart."""
    if len(cpu.available_isas()) < 2:
        pytest.skip("one instruction set runs here")
    qw, x = qkern.quantize_4bit(torch.randn(40, 256)), torch.randn(9, 256)

    def forced() -> Tensor:
        with backends.use("cpu", isa="scalar"):
            return qkern.linear_4bit(x, qw)

    best, scalar = qkern.linear_4bit(x, qw), forced()
    assert not torch.equal(best, scalar)
    with backends.use("cpu", isa="scalar"):
        testing.assert_bitwise(in_thread(lambda: qkern.linear_4bit(x, qw)), best)
    testing.assert_bitwise(in_thread(forced), scalar)
    testing.assert_bitwise(qkern.linear_4bit(x, qw), best)


def gradient(y: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    return found


def functions() -> dict[str, Callable[[Tensor], Tensor]]:
    qw = qkern.quantize_4bit(torch.randn(6, 64))
    a, b = torch.randn(2, 64), torch.randn(6, 2)
    return {
        "linear": lambda x: qkern.linear_4bit(x, qw),
        "lora": lambda x: qkern.lora_linear(x, qw, a, b, 0.5),
    }


@pytest.mark.parametrize("function", ["linear", "lora"])
def test_backward_is_under_what_its_forward_was(function: str) -> None:
    """Out of the block, in another thread, and under another block."""
    inside, other = Recording("inside"), Recording("other")
    x = torch.randn(3, 64, requires_grad=True)
    with qkern.batch_invariant(), backends.use(inside):
        y = functions()[function](x)
    gradient(y, x)
    in_thread(lambda: gradient(y, x))
    with backends.use(other):
        gradient(y, x)
    assert inside.calls == [(FORWARD, True)] + [(BACKWARD, True)] * 3
    assert not other.calls

    outer = functions()[function](x)
    with qkern.batch_invariant(), backends.use(other):
        gradient(outer, x)
    assert other.calls == [(BACKWARD, False)]


def test_the_second_derivative_is_under_what_the_forward_was() -> None:
    inside = Recording("inside")
    dy = torch.randn(3, 6, requires_grad=True)
    x = torch.randn(3, 64, requires_grad=True)
    with qkern.batch_invariant(), backends.use(inside):
        y = functions()["linear"](x)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    dx.sum().backward()
    assert inside.calls == [(FORWARD, True), (BACKWARD, True), (FORWARD, True)]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_a_checkpoints_function_runs_again_under_what_backward_is(reentrant: bool) -> None:
    inside = Recording("inside")
    x = torch.randn(3, 64, requires_grad=True)
    function = functions()["linear"]

    def with_block(x: Tensor) -> Tensor:
        with qkern.batch_invariant(), backends.use(inside):
            return function(x)

    # Of the function itself: wherever it runs.
    checkpoint(with_block, x, use_reentrant=reentrant).sum().backward()
    expected = [(FORWARD, True), (FORWARD, True), (BACKWARD, True)]
    assert inside.calls == expected
    inside.calls.clear()
    # Around forward and backward.
    with qkern.batch_invariant(), backends.use(inside):
        checkpoint(function, x, use_reentrant=reentrant).sum().backward()
    assert inside.calls == expected


class Deeper(torch.autograd.Function):
    """Backward calls itself in turn; autograd goes on in threads of its own when that is deep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, seen: list[Any]) -> Tensor:
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append((threading.get_ident(), in_force()))
        if ctx.depth:
            with torch.enable_grad():
                y = Deeper.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen)
                y.backward()
        return dy, None, None


@blocks
def test_autograds_own_threads_are_in_the_blocks_of_backward(
    block: Block, inside: tuple[bool, str]
) -> None:
    if not hasattr(torch._C, "_remove_obj_from_tls"):
        pytest.skip("this version of torch keeps no context for autograd's threads")
    seen: list[tuple[int, Any]] = []
    with block():
        Deeper.apply(torch.ones(1, requires_grad=True), 70, seen).backward()
    elsewhere = [found for thread, found in seen if thread != threading.get_ident()]
    assert elsewhere[0] == inside


class TestCompiled:
    """Graphs of a compiler."""

    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> None:
        torch.compiler.reset()

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("function", ["linear", "lora"])
    def test_ask_when_they_run(self, function: str, backend: str) -> None:
        inside = Recording("inside")
        compiled = torch.compile(functions()[function], fullgraph=True, backend=backend)
        x = torch.randn(3, 64, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=True), backends.use(inside):
            compiled(x).sum().backward()
            with qkern.batch_invariant():
                y = compiled(x)
            y.sum().backward()
            with qkern.batch_invariant():
                compiled(x).sum().backward()
        assert inside.calls == [
            *((FORWARD, False), (BACKWARD, False)),
            *((FORWARD, True), (BACKWARD, False)),
            *((FORWARD, True), (BACKWARD, True)),
        ]

    def test_keep_a_block_of_their_own(self) -> None:
        inside = Recording("inside")
        function = functions()["linear"]

        def with_block(x: Tensor) -> Tensor:
            with qkern.batch_invariant():
                y = function(x)
            return y + function(2 * x)

        compiled = torch.compile(with_block, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 64, requires_grad=True)
        with backends.use(inside):
            compiled(x).sum().backward()
        assert inside.calls[:2] == [(FORWARD, True), (FORWARD, False)]
        assert sorted(inside.calls[2:]) == [(BACKWARD, False), (BACKWARD, True)]

    def test_are_broken_by_a_forced_backend(self) -> None:
        """A graph cannot keep it; what is in the block then runs as it is."""
        inside = Recording("inside")
        function = functions()["linear"]

        def with_block(x: Tensor) -> Tensor:
            with backends.use(inside):
                return function(x)

        x = torch.randn(3, 64)
        torch.compile(with_block, backend="eager")(x)
        assert inside.calls == [(FORWARD, False)]


ROWS = [(0, 1), (0, 3), (5, 6), (5, 38), (7, 8), (13, 77), (31, 33), (32, 64), (68, 69)]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.DTYPE_NAMES.get)
@pytest.mark.parametrize(("shape", "r"), [((37, 130), 8), ((64, 512), 16), ((33, 77), 1)])
@pytest.mark.parametrize("adapter", ["same", "float32"])
def test_lora_rows_do_not_depend_on_one_another(
    shape: tuple[int, int], r: int, dtype: torch.dtype, adapter: str
) -> None:
    """Nor on their place: neither a row of the result nor one of the gradient of ``x``."""
    out_features, in_features = shape
    qw = qkern.quantize_4bit(torch.randn(shape))
    adapter_dtype = dtype if adapter == "same" else torch.float32
    a = torch.randn(r, in_features, dtype=adapter_dtype, requires_grad=True)
    b = torch.randn(out_features, r, dtype=adapter_dtype, requires_grad=True)
    bias = torch.randn(out_features, dtype=dtype)
    x, dy = torch.randn(77, in_features, dtype=dtype), torch.randn(77, out_features, dtype=dtype)

    def both(rows: slice) -> tuple[Tensor, ...]:
        part = x[rows].clone().requires_grad_()
        with qkern.batch_invariant():
            y = qkern.lora_linear(part, qw, a, b, 0.37, bias)
            with torch.no_grad():
                ungraded = qkern.lora_linear(x[rows], qw, a, b, 0.37, bias)
        y.backward(dy[rows])
        return y.detach(), ungraded, part.grad

    whole = both(slice(None))
    expected = qkern.lora_linear(x, qw, a, b, 0.37, bias)
    torch.testing.assert_close(whole[0], expected, rtol=2e-2, atol=2e-1)
    for start, stop in ROWS:
        for part, full in zip(both(slice(start, stop)), whole, strict=True):
            testing.assert_bitwise(part, full[start:stop], f"{start}:{stop}")
    with qkern.batch_invariant():
        assert qkern.lora_linear(x[:0], qw, a, b, 0.37, bias).shape == (0, out_features)
