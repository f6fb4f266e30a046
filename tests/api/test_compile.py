"""torch.library's own checks of every op, and torch.compile of a LoRA layer on a 4-bit base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkern
from qkern import _inductor, backends, testing
from qkern.backends import cpu
from qkern.testing import OPS, Case, OpSpec, Target

compiled_by = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])

# An op that is not here has its first case checked.
OPCHECK_CASES = {
    "quantize_4bit": [Case((3, 70)), Case((5, 33), format="fp4", layout="transposed")],
    "dequantize_4bit": [
        Case((3, 70), double_quant=True),
        Case((5, 33), torch.bfloat16, format="custom", codebook="unsorted"),
    ],
    "quantize_8bit": [Case((3, 70)), Case((5, 33), torch.float16, layout="step")],
    "dequantize_8bit": [Case((3, 70)), Case((5, 33), torch.bfloat16, layout="transposed")],
    "quantize_absmax": [Case((300,)), Case((3,), layout="step")],
    "adamw_step": [Case((300,)), Case((3, 70), torch.bfloat16, bits=8)],
    "linear_4bit": [
        Case((3, 37, 130), double_quant=True, bias=True),
        Case((3, 37, 130), torch.bfloat16, format="custom", codebook="unsorted"),
        Case((2, 5, 66), layout="transposed", batch_invariant=True),
        Case((4, 5, 66), layout="expanded"),
    ],
    "linear_4bit_int8": [
        Case((3, 37, 128), double_quant=True, bias=True),
        Case((3, 37, 128), torch.bfloat16, format="custom", codebook="unsorted"),
        Case((9, 5, 64), layout="transposed", batch_invariant=True),
    ],
    "linear_4bit_add": [Case((3, 37, 130), torch.bfloat16, bias=True, rank=5)],
    "linear_4bit_dx_add": [Case((3, 37, 130), double_quant=True, rank=5)],
    "grouped_linear_4bit": [
        Case((7, 37, 130), double_quant=True, bias=True, groups=(3, 0, 2)),
        Case((4, 5, 66), torch.bfloat16, layout="transposed", groups=(1, 3)),
    ],
    "grouped_linear_4bit_dx": [
        Case((7, 37, 130), double_quant=True, groups=(3, 0, 2)),
        Case((4, 5, 66), torch.float16, layout="expanded", groups=(1, 3)),
    ],
    "linear_4bit_dx": [
        Case((3, 37, 130), double_quant=True),
        Case((4, 5, 66), torch.float16, layout="expanded"),
    ],
}


@pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))
def test_opcheck(spec: OpSpec, target: Target, device: torch.device) -> None:
    for case in OPCHECK_CASES.get(spec.name, spec.cases[:1]):
        inputs = spec.make_inputs(case, device, torch.Generator().manual_seed(0))
        with target.activate():
            torch.library.opcheck(spec.op.overload, spec.arguments(inputs))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double_quant"])
def test_opcheck_of_dequantize_into_out(
    target: Target, double_quant: bool, device: torch.device
) -> None:
    case = Case((5, 66), torch.bfloat16, double_quant=double_quant)
    inputs = OPS["dequantize_4bit"].make_inputs(case, device, torch.Generator().manual_seed(0))
    out = torch.zeros(inputs.pop("shape"), dtype=inputs.pop("dtype"), device=device)
    with target.activate():
        torch.library.opcheck(torch.ops.qkern.dequantize_4bit_out, (*inputs["weight"], out))


class Block(nn.Module):
    """A transformer's MLP: norm, LoRA on a 4-bit base, activation, a plain 4-bit linear."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        up, down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.up = qkern.nn.LoRALinear(
            qkern.nn.Linear4bit.from_linear(up), r=4, alpha=8, dropout=dropout
        )
        self.down = qkern.nn.Linear4bit.from_linear(down, format="fp4", double_quant=False)
        nn.init.normal_(self.up.lora_b, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


def step(forward: Callable[[Tensor], Tensor], block: Block, x: Tensor) -> dict[str, Tensor]:
    """Result and all gradients of one forward and backward."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    y.square().mean().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@compiled_by
def test_a_lora_block_compiles_without_a_break(backend: str) -> None:
    block, x = Block(), torch.randn(2, 5, 64)
    expected = step(block, block, x)
    assert expected.keys() == {"y", "x", "norm.weight", "norm.bias", "up.lora_a", "up.lora_b"}
    # Reading the report first: fullgraph would raise, but not say how many breaks there are.
    report = torch._dynamo.explain(block)(x.clone().requires_grad_())
    assert report.graph_break_count == 0, report.break_reasons
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert_close(step(compiled, block, x), expected)


def test_dynamic_shapes_compile_once() -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 5, 64), (3, 7, 64), (4, 9, 64), (6, 31, 64)):
            x = torch.randn(shape)
            assert_close(step(compiled, block, x), step(block, block, x))


def test_functions_compile() -> None:
    """Each public function that a model's forward may call, with metadata as constants."""
    qw = qkern.quantize_4bit(torch.randn(40, 64))
    lora_a, lora_b = torch.randn(4, 64) * 0.1, torch.randn(40, 4) * 0.1

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        codes, absmax = qkern.quantize_8bit(x)
        return (
            qkern.nf4_linear(x, qw),
            qkern.lora_linear(x, qw, lora_a, lora_b, 0.5),
            qkern.dequantize_4bit(qw),
            qkern.dequantize_8bit(codes, absmax),
        )

    x = torch.randn(3, 64)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), forward(x), strict=True):
        testing.assert_bitwise(actual, expected)


def test_autocast_compiles() -> None:
    block, x = Block(), torch.randn(2, 5, 64)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(x)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    actual, expected = step(compiled, block, x), step(forward, block, x)
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm()
        assert error < 2e-2, f"{name}: relative error {error:.2e}"


def test_a_saved_graph_runs_on_the_backend_chosen_later() -> None:
    """The backend is looked up when the op runs, not when the graph was made."""
    targets = [t for t in testing.targets("cpu") if not t.reason]
    if len(targets) < 2:
        pytest.skip("only one backend runs here")
    qw = qkern.quantize_4bit(torch.randn(40, 64))
    compiled = torch.compile(lambda x: qkern.linear_4bit(x, qw), fullgraph=True, backend="eager")
    x = torch.randn(300, 64)
    for target in targets:
        with target.activate():
            testing.assert_bitwise(compiled(x), qkern.linear_4bit(x, qw), str(target))


def test_export_keeps_the_ops() -> None:
    qw = qkern.quantize_4bit(torch.randn(40, 64))

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return qkern.linear_4bit(x, qw)

    x = torch.randn(3, 64)
    program = torch.export.export(Layer(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("M")}})
    names = {str(node.target) for node in program.graph.nodes}
    assert "qkern.linear_4bit.default" in names
    other = torch.randn(9, 64)
    testing.assert_bitwise(program.module()(other), qkern.linear_4bit(other, qw))


class OfModes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the ops that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def direct_calls() -> None:
    module = pytest.importorskip("torch._inductor.codegen.custom_extern_kernel_codegen")
    if not hasattr(module, "CUSTOM_EXTERN_KERNEL_CODEGEN"):
        pytest.skip("this torch has no table of how a compiled graph calls an op")
    if "linear_4bit" not in cpu.fast:
        pytest.skip("qkern._C is not built")


@pytest.mark.usefixtures("direct_calls")
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_compiled_code_calls_kernels_and_not_ops(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.utils import run_and_get_code

    block = Block().to(dtype)
    x = torch.randn(3, 5, 64, dtype=dtype)
    expected = block.down(block.up.base_layer(x).to(dtype)).detach()
    calls: list[str] = []
    kernels = {name: cpu.fast[name] for name in ("linear_4bit", "linear_4bit_dx")}

    def noted(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(name)
            return kernels[name](*args)

        return run

    monkeypatch.setattr(cpu, "fast", {name: noted(name) for name in kernels})
    compiled = torch.compile(lambda x: block.down(block.up.base_layer(x)), fullgraph=True)
    given = x.clone().requires_grad_()
    y, code = run_and_get_code(compiled, given)
    y.sum().backward()
    testing.assert_bitwise(y.detach(), expected)
    assert "_qkern.linear_4bit(" in code[0]
    # Neither do the dispatcher's implementations run.
    monkeypatch.setattr("qkern.ops.select", None)
    calls.clear()
    y = compiled(given)
    y.sum().backward()
    assert calls == ["linear_4bit"] * 2 + ["linear_4bit_dx"] * 2
    assert given.grad is not None


@pytest.mark.usefixtures("direct_calls")
def test_a_mode_sees_the_op_of_a_direct_call() -> None:
    qw, x = qkern.quantize_4bit(torch.randn(40, 64)), torch.randn(3, 64)
    with OfModes() as mode:
        y = _inductor.linear_4bit(x, *qw.weight, 40, None, None)
        dx = _inductor.linear_4bit_dx(y, *qw.weight, 64, None)
    assert mode.seen == ["qkern.linear_4bit.default", "qkern.linear_4bit_dx.default"]
    testing.assert_bitwise(y, _inductor.linear_4bit(x, *qw.weight, 40, None, False))
    testing.assert_bitwise(dx, _inductor.linear_4bit_dx(y, *qw.weight, 64, False))


@pytest.mark.usefixtures("direct_calls")
def test_compiled_code_obeys_the_blocks_that_it_runs_in() -> None:
    layer = Block().down
    x = torch.randn(7, 96)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        compiled(x)
        for backend in ("reference", "cpu"):
            with backends.use(backend):
                testing.assert_bitwise(compiled(x), layer(x))
        with qkern.batch_invariant():
            testing.assert_bitwise(compiled(x)[:1], layer(x[:1]))
        with torch.profiler.profile() as profile:
            compiled(x)
    assert any(event.name == "qkern::linear_4bit" for event in profile.events())


@pytest.mark.usefixtures("direct_calls")
def test_direct_calls_obey_blocks_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Block().up.base_layer  # whose rows are whole blocks, as 8 bits need
    x = torch.randn(7, 64)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        exact = compiled(x)
        blocks = {
            "precision": partial(qkern.precision, "int8"),
            "batch_invariant": qkern.batch_invariant,
        }
        expected = {}
        for name, block in blocks.items():
            with block():
                expected[name] = layer(x)
        assert not torch.equal(expected["precision"], exact)
        monkeypatch.setattr("qkern.ops.select", None)  # which every op asks
        for name, block in blocks.items():
            with block():
                testing.assert_bitwise(compiled(x), expected[name])


@pytest.mark.usefixtures("direct_calls")
def test_compiled_code_takes_tensors_that_the_kernel_does_not_read() -> None:
    layer = Block().down
    compiled = torch.compile(lambda x: layer(x.mT), fullgraph=True)
    x = torch.randn(96, 5)
    with torch.no_grad():
        testing.assert_bitwise(compiled(x), layer(x.mT))
        assert compiled(torch.randn(96, 0)).shape == (0, 64)


@pytest.mark.slow
def test_code_in_cpp_calls_the_op() -> None:
    layer, x = Block().down, torch.randn(2, 96)
    with torch.no_grad(), torch._inductor.config.patch(cpp_wrapper=True):
        compiled = torch.compile(layer, fullgraph=True)
        testing.assert_bitwise(compiled(x), layer(x))
