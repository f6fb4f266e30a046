"""bitsandbytes' layers and `matmul_4bit` on qkern's kernels: products, gradients, states."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qkern
from qkern.integrations import bitsandbytes as integration
from tests.integrations.bnb_helpers import (
    STORAGES,
    assert_product,
    dense,
    layer,
    oracle,
    packed_for_inference,
    quantized,
    scales,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
early_matmul_4bit = bnb.matmul_4bit
"""As code has it that was imported before `enable`."""


@pytest.fixture
def enabled():
    with integration.enable():
        yield


@pytest.fixture
def nothing_dense(enabled, monkeypatch):
    """Fails where bitsandbytes would make a dense weight."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("dequantised")

    monkeypatch.setattr(functional, "dequantize_4bit", refuse)


def other_map(state: Any) -> None:
    """Give the state the map of a processor that rounds otherwise: some values are an ulp away."""
    state.state2.code[3::7] = torch.nextafter(state.state2.code[3::7], torch.tensor(2.0))


def compare(multiply: Callable[[Tensor, Tensor | None], Tensor], w: Tensor, dtype: Any) -> None:
    """Product and gradients by the weight ``w`` in float64, with a bias."""
    x = dense((2, 3, w.shape[1]), dtype, seed=3).requires_grad_()
    bias = dense((w.shape[0],), dtype, seed=4).requires_grad_()
    y = multiply(x, bias)
    assert y.dtype == dtype
    assert_product(y, x, w, bias)
    dy = dense(y.shape, dtype, seed=5)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert_product(dx, dy, w.T)
    assert_product(dbias, torch.ones(6), dy.double().view(6, -1).T)


@pytest.mark.usefixtures("nothing_dense")
class TestMatmul:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_product_and_gradients(self, quant_type, nested, storage, dtype):
        packed, state = quantized(
            (40, 96), quant_type=quant_type, compress_statistics=nested, quant_storage=storage
        )
        w = oracle(packed, state)
        compare(lambda x, bias: bnb.matmul_4bit(x, packed, state, bias=bias), w, dtype)

    @pytest.mark.parametrize("blocksize", [32, 128, 512, 4096])
    @pytest.mark.parametrize("shape", [(40, 96), (7, 34), (3, 1000)], ids=str)
    def test_block_sizes_and_shapes(self, shape, blocksize):
        packed, state = quantized(shape, blocksize=blocksize, compress_statistics=True)
        w = oracle(packed, state)
        compare(lambda x, bias: bnb.matmul_4bit(x, packed, state, bias=bias), w, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_states_own_map_decodes(self, dtype):
        packed, state = quantized((40, 96), compress_statistics=True)
        compare(
            lambda x, b: bnb.matmul_4bit(x, packed, state, bias=b), oracle(packed, state), dtype
        )
        with torch.no_grad():
            other_map(state)  # in place: what was known of the map holds no longer
        w = oracle(packed, state)
        compare(lambda x, bias: bnb.matmul_4bit(x, packed, state, bias=bias), w, dtype)
        wide = state.state2.code
        wide *= 3
        compare(
            lambda x, b: bnb.matmul_4bit(x, packed, state, bias=b), oracle(packed, state), dtype
        )

    def test_a_map_in_inference_mode(self):
        with torch.inference_mode():
            packed, state = quantized((40, 96), compress_statistics=True)
            x = dense((3, 96))
            assert_product(bnb.matmul_4bit(x, packed, state), x, oracle(packed, state))
            other_map(state)
            state.state2.code.mul_(2)
            assert_product(bnb.matmul_4bit(x, packed, state), x, oracle(packed, state))

    def test_groups_of_another_size(self):
        packed, state = quantized((40, 96))
        offset = state.absmax.mean()
        codes, inner = functional.quantize_blockwise(state.absmax - offset, blocksize=64)
        state.absmax, state.offset, state.state2, state.nested = codes, offset, inner, True
        w = oracle(packed, state)
        compare(lambda x, bias: bnb.matmul_4bit(x, packed, state, bias=bias), w, torch.float32)

    @pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 3, 96), (0, 96), (2, 0, 96)], ids=str)
    @pytest.mark.parametrize("grad", [False, True])
    def test_dimensions(self, shape, grad):
        packed, state = quantized((40, 96))
        x = dense(shape).requires_grad_(grad)
        y = bnb.matmul_4bit(x, packed, state)
        assert_product(y, x, oracle(packed, state))
        if grad:
            y.sum().backward()
            assert_product(x.grad, torch.ones_like(y), oracle(packed, state).T)

    def test_strides(self):
        packed, state = quantized((40, 96))
        x = dense((96, 6)).t()[::2].requires_grad_()
        y = bnb.matmul_4bit(x, packed, state)
        assert_product(y, x, oracle(packed, state))
        (dx,) = torch.autograd.grad(y.sum(), x)  # a gradient whose strides are 0
        assert_product(dx, torch.ones_like(y), oracle(packed, state).T)

    @pytest.mark.parametrize("square", [False, True])
    def test_transposed_codes_are_the_same_weight(self, square):
        packed, state = quantized((96 if square else 40, 96))
        x = dense((3, 96))
        assert_product(bnb.matmul_4bit(x, packed.t(), state), x, oracle(packed, state))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_weight_quantised_the_other_way_round(self, nested, dtype):
        packed, state = quantized((96, 40), compress_statistics=nested)
        w = oracle(packed, state).T
        with pytest.warns(DeprecationWarning, match="which is .in_features, out_features"):
            compare(lambda x, bias: bnb.matmul_4bit(x, packed, state, bias=bias), w, dtype)
        x = dense((3, 96), dtype)
        with pytest.warns(DeprecationWarning, match="quantise the transposed weight"):
            assert_product(bnb.matmul_4bit(x, packed, state), x, w)

    def test_out(self):
        packed, state = quantized((40, 96))
        x, out = dense((3, 96)).requires_grad_(), torch.full((3, 40), torch.nan)
        with torch.no_grad():
            assert bnb.matmul_4bit(x, packed, state, out=out) is out
            assert_product(out, x, oracle(packed, state))
            for wrong in (torch.empty(3, 41), torch.empty(2, 3, 40)):
                with pytest.raises(ValueError, match="out: got shape"):
                    bnb.matmul_4bit(x, packed, state, out=wrong)
        bnb.matmul_4bit(x, packed, state, out=out).sum().backward()
        assert_product(x.grad, torch.ones(3, 40), oracle(packed, state).T)

    def test_gradients_of_gradients(self):
        packed, state = quantized((40, 96), compress_statistics=True)
        for change in (lambda state: None, other_map):
            change(state)
            w = oracle(packed, state)
            x, v = dense((3, 96)).requires_grad_(), dense((3, 40)).requires_grad_()
            y = bnb.matmul_4bit(x, packed, state)
            (dx,) = torch.autograd.grad(y, x, v, create_graph=True)
            u = dense((3, 96), seed=7)
            (dv,) = torch.autograd.grad(dx, v, u)
            assert_product(dv, u, w)

    def test_forward_derivatives(self):
        packed, state = quantized((40, 96), compress_statistics=True)
        x, tangent = dense((3, 96)), dense((3, 96), seed=1)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            y = torch.autograd.forward_ad.unpack_dual(bnb.matmul_4bit(dual, packed, state))
            assert_product(y.tangent, tangent, oracle(packed, state))

    def test_code_imported_before_has_the_kernels_too(self):
        packed, state = quantized((40, 96), compress_statistics=True)
        w = oracle(packed, state)
        compare(lambda x, bias: early_matmul_4bit(x, packed, state, bias=bias), w, torch.float32)

    def test_autocast_decides_the_dtype(self):
        packed, state = quantized((40, 96), compress_statistics=True)
        w, x = oracle(packed, state), dense((3, 96)).requires_grad_()
        for change in (lambda state: None, other_map):
            change(state)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = bnb.matmul_4bit(x, packed, state, bias=dense((40,)))
            assert y.dtype == torch.bfloat16
            assert_product(y, x.bfloat16(), w, dense((40,)).bfloat16())
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert dx.dtype == torch.float32

    def test_rows_do_not_depend_on_one_another_where_asked(self):
        packed, state = quantized((40, 96), compress_statistics=True)
        x = dense((65, 96), torch.bfloat16).requires_grad_()
        with qkern.batch_invariant():
            whole = bnb.matmul_4bit(x, packed, state)
            assert torch.equal(whole[7:8], bnb.matmul_4bit(x[7:8], packed, state))
            assert torch.equal(whole[7:8], early_matmul_4bit(x[7:8].detach(), packed, state))

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            ({"A": dense((2, 95))}, r"x: got shape \[2, 95\]"),
            ({"A": dense((2, 96)).double()}, "x: got torch.float64"),
            ({"bias": dense((41,))}, r"bias: got shape \[41\]"),
            ({"quant_state": None}, "quant_state is required"),
        ],
    )
    def test_wrong_arguments_are_named(self, wrong, error):
        packed, state = quantized((40, 96))
        arguments = {"A": dense((2, 96)), "B": packed, "quant_state": state} | wrong
        with pytest.raises((TypeError, ValueError), match=error):
            bnb.matmul_4bit(**arguments)

    def test_a_state_of_other_dimensions_is_refused(self):
        packed, state = quantized((4, 10, 96))
        with pytest.raises(ValueError, match=r"quant_state: got shape \[4, 10, 96\]"):
            bnb.matmul_4bit(dense((2, 96)), packed, state)

    def test_nothing_but_the_weight_is_kept_for_the_backward(self):
        packed, state = quantized((256, 256), compress_statistics=True)
        for change in (lambda state: None, other_map):
            change(state)
            kept: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
                bnb.matmul_4bit(dense((512, 256)).requires_grad_(), packed, state)
            assert {t.data_ptr() for t in kept} <= {
                t.data_ptr()
                for t in (
                    packed,
                    state.absmax,
                    state.offset,
                    state.state2.absmax,
                    state.state2.code,
                )
            }


@pytest.mark.usefixtures("enabled")
class TestLayers:
    @pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_forward_and_backward_in_training_and_evaluation(self, dtype, compute_dtype):
        made = layer(dtype=dtype, compute_dtype=compute_dtype)
        w = oracle(made.weight.data, made.weight.quant_state)
        for training in (True, False, True):
            made.train(training)
            x = dense((4, 96), dtype).requires_grad_()
            y = made(x)
            assert y.dtype == dtype
            coarse = compute_dtype or dtype
            assert_product(y.to(coarse), x, w, made.bias)
            y.sum().backward()
            assert_product(x.grad.to(coarse), torch.ones_like(y), w.T)
            with torch.no_grad():
                assert_product(made(x).to(coarse), x, w, made.bias)

    @pytest.mark.parametrize("nested", [False, True])
    def test_evaluation_changes_neither_gradients_nor_the_state(self, nested):
        made = layer(compress_statistics=nested)
        made.support_avx512bf16_for_cpu = True  # as on processors that multiply in bfloat16
        before = {k: v.clone() for k, v in made.state_dict().items()}
        x = dense((4, 96)).requires_grad_()
        (expected,) = torch.autograd.grad(made(x).sum(), x)
        made.eval()
        with torch.no_grad():
            made(x.detach())
        made(x.detach())
        assert torch.equal(torch.autograd.grad(made(x).sum(), x)[0], expected)
        after = made.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[k], v) for k, v in before.items())
        integration.disable()
        assert made.support_avx512bf16_for_cpu is True

    def test_copies_and_pickles(self):
        made = layer()
        x = dense((3, 96))
        expected = made(x)
        assert torch.equal(copy.deepcopy(made)(x), expected)
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_state_loads_into_its_own_layer(self, nested):
        made = layer(compress_statistics=nested)
        state = made.state_dict()
        parts = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
        fresh = bnb.nn.Linear4bit(96, 64, quant_type="nf4")
        fresh.weight = bnb.nn.Params4bit.from_prequantized(
            state["weight"], parts, device="cpu", module=fresh
        )
        fresh.bias = made.bias
        x = dense((3, 96))
        assert torch.equal(fresh(x), made(x))

    def test_its_embedding(self):
        table = bnb.nn.Embedding4bit(50, 64, quant_type="nf4").to("cpu")
        rows = torch.tensor([[3, 49], [0, 3]])
        w = oracle(table.weight.data, table.weight.quant_state).float()
        assert torch.equal(table(rows), w[rows])

    def test_threads(self):
        made = layer()
        x = dense((5, 96))
        expected, found = made(x), []
        threads = [threading.Thread(target=lambda: found.append(made(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert all(torch.equal(y, expected) for y in found)

    def test_meta_and_fake_tensors(self):
        made = layer()
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(4, 96, requires_grad=True)
            y = made(x)
            assert y.shape == (4, 64)
            assert torch.autograd.grad(y.sum(), x)[0].shape == (4, 96)
        packed, state = quantized((40, 96))
        state.to("meta")
        x = torch.empty(3, 96, device="meta", requires_grad=True)
        y = bnb.matmul_4bit(x, packed.to("meta"), state)
        assert y.is_meta
        assert y.shape == (3, 40)

    @pytest.mark.parametrize("nested", [False, True])
    def test_compiled(self, nested):
        torch._dynamo.reset()
        made = layer(compress_statistics=nested)
        w = oracle(made.weight.data, made.weight.quant_state)
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        x = dense((4, 96)).requires_grad_()
        for training in (True, False):
            made.train(training)
            y = compiled(x)
            assert_product(y, x, w, made.bias)
            assert_product(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(y), w.T)
            with torch.no_grad():
                assert_product(compiled(x), x, w, made.bias)
        integration.disable()
        assert_product(compiled(x), x, w, made.bias)


class TestPackedBefore:
    """Weights that bitsandbytes packed for CPU inference before `enable`, which it cannot undo."""

    @staticmethod
    def made(nested: bool, storage: torch.dtype = torch.uint8) -> tuple[Any, Tensor]:
        """A layer after an evaluation forward, and the weight that it has from then on."""
        made = layer(128, 64, compress_statistics=nested, quant_storage=storage)
        state = made.weight.quant_state
        before = scales(state)
        spread = before.double().repeat_interleave(64).view(64, -1)
        values = (oracle(made.weight.data, state) / spread).float()  # of the table, exactly
        made.weight.data, _ = packed_for_inference(made.weight.data, state)
        assert state.packing_format_for_cpu
        rounded = before.bfloat16().double().repeat_interleave(64).view(64, -1)
        return made.eval(), values * rounded

    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_forward_unpacks_it(self, nested, storage):
        made, w = self.made(nested, storage)
        x = dense((3, 128)).requires_grad_()
        with integration.enable():
            with pytest.warns(UserWarning, match="its scales stay rounded to bfloat16"):
                y = made(x)
            compare(lambda x, _: made(x) - made.bias + _, w, torch.float32)
            assert_product(y, x, w, made.bias)
            assert made.weight.dtype == storage
            assert made.weight.shape == (64 * 128 // 2 // storage.itemsize, 1)
            assert not made.weight.quant_state.packing_format_for_cpu
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                made(x)

    @pytest.mark.parametrize("nested", [False, True])
    def test_what_is_saved_is_what_it_computed(self, nested):
        made, w = self.made(nested)
        with integration.enable():
            with pytest.warns(UserWarning, match="rounded"):
                saved = made.state_dict()
            parts = {k[7:]: v for k, v in saved.items() if k.startswith("weight.")}
            state = functional.QuantState.from_dict(parts, device="cpu")
            assert torch.equal(functional.dequantize_4bit(saved["weight"], state), w.float())

    def test_a_weight_that_somebody_else_holds_stays(self):
        made, w = self.made(nested=True)
        held, state = made.weight.data, made.weight.quant_state
        x = dense((3, 128)).requires_grad_()
        with integration.enable(), pytest.warns(UserWarning, match="rounded"):
            y = bnb.matmul_4bit(x, held, state)
        assert_product(y, x, w)
        assert y.requires_grad
        assert state.packing_format_for_cpu
        assert made.weight.data.data_ptr() == held.data_ptr()

    def test_its_own_undoing_is_read_right(self):
        """Which leaves scales without double quantisation as they were packed."""
        made, w = self.made(nested=False)
        made.state_dict()  # undoes it
        state = made.weight.quant_state
        assert state.absmax.dim() == 2
        with integration.enable():
            compare(
                lambda x, bias: bnb.matmul_4bit(x, made.weight, state, bias=bias), w, torch.float32
            )
            found = functional.dequantize_4bit(made.weight, state)
            assert torch.equal(found, w.float())
            state.absmax = state.absmax.t()
            with pytest.raises(ValueError, match=r"absmax: got torch.bfloat16 \[64, 2\]"):
                made(dense((3, 128)))
