"""bitsandbytes' ops on qkern's kernels: bits, shapes, errors, and what its own compute."""

from __future__ import annotations

import warnings

import pytest
import torch
from bitsandbytes import functional

from qkern import formats
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
SHAPES = [(64, 128), (3, 96), (5, 7), (1000,), (2, 3, 64), (1, 1)]
ops = torch.ops.bitsandbytes


@pytest.fixture
def enabled():
    with integration.enable() as handle:
        yield handle
    assert integration.enabled_devices() == ()


def own(call):
    """What bitsandbytes' own kernels give within a test that enabled qkern's."""
    integration.disable()
    try:
        return call()
    finally:
        integration.enable()


@pytest.mark.usefixtures("enabled")
class TestQuantize:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("blocksize", [32, 64, 4096])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_codes_and_scales_are_its_own_bits(self, shape, blocksize, dtype):
        w = dense(shape, dtype)
        packed, absmax = ops.quantize_4bit(w, blocksize, "nf4", torch.uint8)
        theirs = own(lambda: ops.quantize_4bit(w, blocksize, "nf4", torch.uint8))
        torch.testing.assert_close((packed, absmax), theirs, rtol=0, atol=0)

    @pytest.mark.parametrize("nested", [False, True])
    def test_fp4_differs_in_the_sign_of_zeros_alone(self, nested):
        w = dense((128, 128))
        w[::3] *= 1e-4  # many round to zero
        w[0, 0] = 1.0
        mine = functional.quantize_4bit(w, quant_type="fp4", compress_statistics=nested)
        theirs = own(
            lambda: functional.quantize_4bit(w, quant_type="fp4", compress_statistics=nested)
        )
        mine_codes, codes = (torch.cat([p >> 4, p & 0xF], 1) for p in (mine[0], theirs[0]))
        differ = mine_codes != codes
        assert differ.any()
        assert set(codes[differ].tolist()) | set(mine_codes[differ].tolist()) == {0, 8}
        assert torch.equal(mine_codes >= 8, w.view(-1, 2) < 0)
        assert torch.equal(scales(mine[1]), scales(theirs[1]))

    def test_nested_scales_are_its_own_bits(self):
        w = dense((300, 1024))
        mine = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        theirs = own(
            lambda: functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        )
        for a, b in zip(
            mine[1].as_dict(True).items(), theirs[1].as_dict(True).items(), strict=True
        ):
            assert a[0] == b[0]
            assert torch.equal(a[1], b[1])

    @pytest.mark.parametrize("storage", STORAGES)
    def test_storage_holds_the_same_bytes(self, storage):
        w = dense((64, 96))
        packed, _ = ops.quantize_4bit(w, 64, "nf4", storage)
        assert packed.dtype == storage
        assert packed.shape == (64 * 96 // 2 // storage.itemsize, 1)
        plain, _ = ops.quantize_4bit(w, 64, "nf4", torch.uint8)
        assert torch.equal(packed.view(torch.uint8).view(-1), plain.view(-1))

    def test_a_view_of_other_strides_is_read_right(self):
        w = dense((64, 96)).t()
        expected = ops.quantize_4bit(w.contiguous(), 64, "nf4", torch.uint8)
        assert torch.equal(ops.quantize_4bit(w, 64, "nf4", torch.uint8)[0], expected[0])

    def test_nothing_makes_nothing(self):
        packed, absmax = ops.quantize_4bit(torch.empty(0, 64), 64, "nf4", torch.uint8)
        assert packed.shape == (0, 1)
        assert absmax.shape == (0,)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ((dense((4, 64)), 48, "nf4", torch.uint8), "blocksize: got 48"),
            ((dense((4, 64)), 64, "int4", torch.uint8), "quant_type: got 'int4'"),
            ((dense((3, 2)), 64, "nf4", torch.float32), "quant_storage: got torch.float32 for 3"),
            ((dense((4, 64)).double(), 64, "nf4", torch.uint8), "A: got torch.float64"),
        ],
    )
    def test_wrong_arguments_are_named(self, arguments, error):
        with pytest.raises((TypeError, ValueError), match=error):
            ops.quantize_4bit(*arguments)


@pytest.mark.usefixtures("enabled")
class TestDequantize:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_values_are_its_own_bits(self, quant_type, storage, dtype):
        packed, state = quantized((64, 128), quant_type=quant_type, quant_storage=storage)
        args = packed, state.absmax, 64, quant_type, (64, 128), dtype
        assert torch.equal(ops.dequantize_4bit(*args), own(lambda: ops.dequantize_4bit(*args)))

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_any_shape_is_the_definition(self, shape, nested):
        packed, state = quantized(shape, blocksize=32, compress_statistics=nested)
        found = functional.dequantize_4bit(packed, state)
        if packed.shape[0] == 1:  # as bitsandbytes reads a transposed weight
            found = found.t()
        assert found.shape == shape
        assert torch.equal(found, oracle(packed, state).float())

    def test_a_transposed_weight_gives_a_transposed_result(self):
        packed, state = quantized((64, 96))
        assert torch.equal(
            functional.dequantize_4bit(packed.t(), state), oracle(packed, state).float().t()
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scales_of_any_shape_and_dtype(self, dtype):
        packed, state = quantized((128, 128))
        w = oracle(packed, state)
        absmax = state.absmax.to(dtype)
        spread = state.absmax.repeat_interleave(64).view(128, 128)
        values = (w / spread).float() * absmax.float().repeat_interleave(64).view(128, 128)
        shapes = [absmax, absmax.repeat_interleave(2)[::2]]
        if dtype != torch.bfloat16:  # in which two dimensions are those of a packed weight
            shapes.append(absmax.view(128, 2))
        for given in shapes:
            found = ops.dequantize_4bit(packed, given, 64, "nf4", (128, 128), torch.float32)
            assert torch.equal(found, values)

    def test_out_is_written_whatever_its_strides(self):
        packed, state = quantized((64, 96))
        for out in (torch.full((64, 96), torch.nan), torch.full((96, 64), torch.nan).t()):
            before = out._version
            assert functional.dequantize_4bit(packed, state, out=out) is out
            assert torch.equal(out, oracle(packed, state).float())
            assert out._version > before

    @pytest.mark.parametrize(
        ("out", "error"),
        [
            (torch.empty(64, 95), r"out: got shape \[64, 95\]"),
            (torch.empty(64, 96, dtype=torch.float16), "out: got torch.float16"),
        ],
    )
    def test_a_wrong_out_is_named(self, out, error):
        packed, state = quantized((64, 96))
        with pytest.raises((TypeError, ValueError), match=error):
            functional.dequantize_4bit(packed, state, out=out)

    def test_codes_of_another_number_are_refused(self):
        packed, state = quantized((64, 96))
        with pytest.raises(ValueError, match="packed: got 3071 elements; takes 3072"):
            functional.dequantize_4bit(packed[:-1], state)


@pytest.mark.usefixtures("enabled")
class TestMatmulOps:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("shape", [(3, 96), (2, 3, 96), (96,), (0, 96)], ids=str)
    def test_gemm_is_the_product(self, shape, nested, dtype):
        packed, state = quantized((40, 96), compress_statistics=nested)
        x, bias = dense(shape, dtype), dense((40,), dtype)
        scale_tensors = (state.absmax,)
        if nested:
            scale_tensors = (state.state2.absmax, state.absmax, state.state2.code, state.offset)
        absmax, *others = scale_tensors
        y = ops.gemm_4bit(x, packed, [40, 96], absmax, 64, "nf4", bias, *others)
        assert y.dtype == dtype
        assert_product(y, x, oracle(packed, state), bias)

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_gemv_is_the_product(self, quant_type):
        packed, state = quantized((40, 96), quant_type=quant_type, compress_statistics=True)
        x = dense((2, 1, 96))
        w = oracle(packed, state)
        assert_product(functional.gemv_4bit(x, packed, state=state), x, w)
        out = torch.full((2, 1, 40), torch.nan)
        assert functional.gemv_4bit(x, packed, out=out, state=state) is out
        assert_product(out, x, w)

    def test_gemv_multiplies_by_the_table_it_is_given(self):
        packed, state = quantized((40, 96))
        x, w = dense((2, 96)), oracle(packed, state)
        assert_product(functional.gemv_4bit(x, packed, state=state), x, w)
        state.code.mul_(0.5)  # in place: what was known of the table holds no longer
        assert_product(functional.gemv_4bit(x, packed, state=state), x, w / 2)

    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
    def test_gemv_takes_what_was_packed_for_inference(self, storage):
        packed, state = quantized((64, 128), quant_storage=storage)
        w = oracle(packed, state)
        rounded = (w / scales(state).double().repeat_interleave(64).view(64, 128)).nan_to_num()
        repacked, packed_state = packed_for_inference(packed, state)
        steps = packed_state.absmax.t().reshape(-1).double().repeat_interleave(64).view(64, 128)
        x = dense((3, 128), torch.bfloat16)
        y = functional.gemv_4bit(x, repacked, state=packed_state)
        assert_product(y, x, rounded * steps)

    @pytest.mark.parametrize("op", ["gemm_4bit_dx", "gemm_4bit"])
    def test_tracers_get_shapes(self, op):
        packed, state = quantized((40, 96), compress_statistics=True)
        nested = state.absmax, state.state2.code, state.offset
        scale = [40, 96], state.state2.absmax, 64, "nf4"
        if op == "gemm_4bit":
            args = (dense((2, 3, 96)), packed, *scale, None, *nested)
            torch.library.opcheck(ops.gemm_4bit.default, args)
        else:
            args = (dense((2, 3, 40)), packed, *scale, *nested)
            torch.library.opcheck(torch.ops.qkern_bitsandbytes.gemm_4bit_dx.default, args)

    def test_every_op_passes_torchs_checks(self):
        packed, state = quantized((40, 96))
        shape, code = [40, 96], formats.code_tensor("nf4")
        x, out = dense((2, 96)), torch.empty(2, 40)
        parts = packed, state.absmax, 64, "nf4", shape, torch.float32
        checks = (
            (ops.quantize_4bit.default, (dense((40, 96)), 64, "nf4", torch.uint8)),
            (ops.dequantize_4bit.default, parts),
            (ops.gemv_4bit.default, (x, packed, shape, state.absmax, code, 64)),
            (ops.gemv_4bit.out, (x, packed, shape, state.absmax, code, 64, out)),
        )
        for op, args in checks:
            torch.library.opcheck(op, args)
        # Its fake kernel compares a list with a torch.Size, and refuses every out.
        args = *parts, torch.empty(40, 96)
        torch.library.opcheck(ops.dequantize_4bit.out, args, test_utils="test_schema")

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"shapeB": [3840]}, r"shapeB: got \[3840\]; takes two sizes"),
            ({"blocksize": 100}, "blocksize: got 100"),
            ({"quant_type": "int8"}, "quant_type: got 'int8'"),
            ({"absmax_code": None}, "absmax_code: got None"),
            ({"absmax_offset": None}, "absmax_offset: got None"),
            ({"A": dense((2, 95))}, r"A: got shape \[2, 95\]; takes \[..., 96\]"),
            ({"A": dense((2, 96)).long()}, "x: got torch.int64"),
            ({"bias": dense((41,))}, "bias: got 41 elements"),
            ({"bias": dense((40,)).half()}, "bias: got torch.float16"),
        ],
    )
    def test_wrong_arguments_are_named(self, change, error):
        packed, state = quantized((40, 96), compress_statistics=True)
        arguments = {
            "A": dense((2, 96)),
            "B": packed,
            "shapeB": [40, 96],
            "absmax": state.state2.absmax,
            "blocksize": 64,
            "quant_type": "nf4",
            "bias": None,
            "absmax_8bit": state.absmax,
            "absmax_code": state.state2.code,
            "absmax_offset": state.offset,
        }
        with pytest.raises((TypeError, ValueError), match=error):
            ops.gemm_4bit(**{**arguments, **change})

    def test_autocast_does_not_change_what_an_op_promises(self):
        packed, state = quantized((40, 96))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ops.gemm_4bit(dense((2, 96)), packed, [40, 96], state.absmax, 64, "nf4")
        assert y.dtype == torch.float32


@pytest.mark.usefixtures("enabled")
def test_8_bit_ops_stay_its_own():
    x = dense((5, 1000))
    mine = functional.quantize_blockwise(x, blocksize=256)
    theirs = own(lambda: functional.quantize_blockwise(x, blocksize=256))
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1].absmax, theirs[1].absmax)


@pytest.mark.usefixtures("enabled")
def test_rows_of_no_whole_blocks_are_read_right():
    """96 columns in blocks of 64, which bitsandbytes' CPU kernels misread."""
    packed, state = quantized((64, 96))
    assert torch.equal(functional.dequantize_4bit(packed, state), oracle(packed, state).float())


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with integration.enable():
            layer()(dense((2, 96)))
