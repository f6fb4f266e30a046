from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

import qkern
from qkern import nn as qnn
from tests import models

CODEBOOK = torch.linspace(-1, 1, 16)
FORMATS = [
    pytest.param({"format": "nf4"}, id="nf4"),
    pytest.param({"format": "fp4", "block_size": 32}, id="fp4"),
    pytest.param({"format": "nf4", "double_quant": False}, id="nf4-single"),
    pytest.param({"format": "custom", "codebook": CODEBOOK}, id="custom"),
]


def tiny_llama(tie: bool = False) -> LlamaForCausalLM:
    return models.tiny_llama(tie_word_embeddings=tie).eval()


def quantized_linear(bias: bool = True, dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(1)
    return qnn.Linear4bit.from_linear(nn.Linear(100, 70, bias, dtype=dtype), **options)


def codes(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of all 4-bit weights: the parameters that are integers."""
    found = {n: p.detach().clone() for n, p in module.named_parameters() if "int" in str(p.dtype)}
    assert found
    return found


def assert_same_codes(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = codes(module)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


class TestLinear4bit:
    @pytest.mark.parametrize("options", FORMATS)
    def test_equals_dense_layer_on_dequantised_weight(self, options):
        layer = quantized_linear(**options)
        x = torch.randn(2, 3, 100, requires_grad=True)
        reference = x.detach().clone().requires_grad_()
        expected = F.linear(reference, layer.quantized.dequantize(), layer.bias.detach())
        y = layer(x)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(x.grad, reference.grad)
        torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_weight_reads_like_a_weight(self, dtype):
        layer = quantized_linear(dtype=dtype)
        assert layer.quantized.shape == (70, 100)
        assert layer.quantized.dtype == dtype
        assert layer.quantized.device == torch.device("cpu")
        assert isinstance(layer.quantized, qkern.QuantizedTensor)
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (100, 70)
        # As code written for bitsandbytes asks.
        assert type(layer.weight) is nn.Parameter
        assert not layer.weight.requires_grad
        assert layer.weight.shape == layer.weight.data.shape == (3500, 1)
        assert layer.weight.t().shape == (1, 3500)
        assert layer.weight.numel() == 3500
        assert (layer.weight.dtype, layer.weight.device.type) == (torch.uint8, "cpu")

    def test_weight_follows_its_parameters(self):
        layer, other = quantized_linear(), quantized_linear(double_quant=False)
        for name in ("weight", "absmax", "nested_absmax", "nested_offset"):
            own = {"weight": "packed"}.get(name, name)
            parameter = getattr(layer, name)
            assert getattr(layer.quantized, own).data_ptr() == parameter.data_ptr()
            parameter.data = parameter.data.clone()
            assert getattr(layer.quantized, own).data_ptr() == parameter.data_ptr()
            replaced = nn.Parameter(parameter.data.clone(), requires_grad=False)
            setattr(layer, name, replaced)
            assert getattr(layer.quantized, own).data_ptr() == replaced.data_ptr()
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
        assert layer.quantized.packed.data_ptr() == state["weight"].data_ptr()
        assert layer.bfloat16().quantized.dtype == torch.bfloat16
        assert other.quantized.absmax.dtype == torch.float32

    def test_moving_releases_the_old_tensors(self):
        layer = quantized_linear()
        old = weakref.ref(layer.quantized.packed.untyped_storage())
        parameter = weakref.ref(layer.weight)
        layer(torch.randn(3, 100))
        layer.to("meta")
        assert old() is None
        assert parameter() is None

    def test_activation_decides_the_dtype(self):
        layer = quantized_linear(dtype=torch.bfloat16)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert layer(torch.randn(3, 100, dtype=dtype)).dtype == dtype

    def test_only_the_bias_is_trainable(self):
        layer = quantized_linear().requires_grad_()
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
        assert list(layer.buffers()) == []
        layer(torch.randn(2, 100)).sum().backward()
        assert layer.bias.grad is not None
        assert all(p.grad is None for n, p in layer.named_parameters() if n != "bias")
        without = quantized_linear(bias=False).requires_grad_()
        assert not any(p.requires_grad for p in without.parameters())
        assert all(p.dtype in (torch.uint8, torch.int32) for p in without.parameters())

    @pytest.mark.parametrize("options", FORMATS)
    def test_state_dict_round_trip_through_safetensors(self, options, tmp_path):
        layer = quantized_linear(**options)
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        other = qnn.Linear4bit(
            100, 70, **{name: value for name, value in options.items() if name != "codebook"}
        )
        assert torch.count_nonzero(other.quantized.dequantize()) == 0
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        assert_same_codes(other, codes(layer))
        x = torch.randn(3, 100)
        assert torch.equal(other(x), layer(x))

    def test_load_onto_the_meta_device(self):
        layer = quantized_linear()
        other = qnn.Linear4bit(100, 70, device="meta")
        other.load_state_dict(layer.state_dict(), assign=True)
        assert_same_codes(other, codes(layer))

    def test_materialised_meta_layer_saves_valid_metadata(self):
        layer = qnn.Linear4bit(100, 70, device="meta").to_empty(device="cpu")
        assert torch.equal(layer.quant_meta, quantized_linear().quant_meta)

    @pytest.mark.parametrize(
        "make",
        [quantized_linear, lambda: qnn.Embedding4bit.from_embedding(nn.Embedding(37, 33))],
        ids=["linear", "table"],
    )
    def test_empty_memory_on_the_same_device_gets_valid_metadata(self, make):
        layer, right = make(), make()
        model = nn.Sequential(layer).to_empty(device="cpu")
        assert torch.equal(model[0].quant_meta, right.quant_meta)
        model.load_state_dict({f"0.{name}": t for name, t in right.state_dict().items()})
        assert_same_codes(model[0], codes(right))

    def test_moving_leaves_metadata_where_it_is(self):
        layer = quantized_linear()
        layer.quant_meta.data = layer.quant_meta.data.clone()
        pointer, version = layer.quant_meta.data_ptr(), layer.quant_meta._version
        layer.to("cpu").half()
        assert (layer.quant_meta.data_ptr(), layer.quant_meta._version) == (pointer, version)

    def test_metadata_spelled_otherwise_is_saved_as_the_modules_own(self):
        layer, other = quantized_linear(), quantized_linear()
        text = json.dumps(json.loads(bytes(layer.quant_meta.tolist())))
        text = text.replace("64", "64.0").replace("[70, 100]", "[70.0, 100.0]")
        state = layer.state_dict()
        state["quant_meta"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        for assign in (False, True):
            other.load_state_dict(state, assign=assign)
            assert torch.equal(other.quant_meta, layer.quant_meta)

    def test_a_state_dict_on_meta_loads_there(self):
        layer = qnn.Linear4bit(100, 70, device="meta")
        layer.load_state_dict(layer.state_dict(), assign=True)
        assert all(p.is_meta for p in layer.parameters())
        layer.load_state_dict(quantized_linear().state_dict(), assign=True)
        assert_same_codes(layer, codes(quantized_linear()))

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (qnn.Linear4bit(70, 100), r"'shape': \[100, 70\].*this module takes.*\[70, 100\]"),
            (qnn.Linear4bit(100, 70, format="fp4"), "'format': 'fp4'.*'format': 'nf4'"),
            (qnn.Linear4bit(100, 70, block_size=32), "'block_size': 32.*'block_size': 64"),
            (qnn.Linear4bit(100, 70, double_quant=False), "'double_quant': False"),
            (nn.Linear(100, 70), "dense weight"),
        ],
    )
    def test_load_refuses_another_weight(self, layer, message):
        target = quantized_linear()
        before = codes(target)
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=message):
                target.load_state_dict(layer.state_dict(), strict=strict)
        assert_same_codes(target, before)

    def test_load_refuses_scales_in_another_dtype(self):
        target = quantized_linear(double_quant=False)
        state = target.state_dict()
        state["absmax"] = state["absmax"].bfloat16()
        with pytest.raises(RuntimeError, match=r"absmax: got torch.bfloat16; takes torch.int32"):
            target.load_state_dict(state)

    def test_load_refuses_damaged_metadata(self):
        state = quantized_linear().state_dict()
        state["quant_meta"] = state["quant_meta"][:-1]
        with pytest.raises(RuntimeError, match="quant_meta is not the JSON"):
            quantized_linear().load_state_dict(state)

    def test_load_names_missing_and_unexpected_keys(self):
        state = quantized_linear().state_dict()
        del state["nested_offset"]
        with pytest.raises(RuntimeError, match=r"Missing key.*nested_offset"):
            quantized_linear().load_state_dict(state)
        state = quantized_linear().state_dict() | {"stray": torch.zeros(1)}
        with pytest.raises(RuntimeError, match=r"Unexpected key.*stray"):
            quantized_linear().load_state_dict(state)

    @pytest.mark.parametrize(
        ("cast", "dtype"),
        [
            (lambda m: m.half(), torch.float16),
            (lambda m: m.bfloat16(), torch.bfloat16),
            (lambda m: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m: m.to("cpu", torch.float16), torch.float16),
            (lambda m: m.bfloat16().float(), torch.float32),
        ],
    )
    @pytest.mark.parametrize("options", FORMATS)
    def test_casts_leave_codes_and_scales(self, cast, dtype, options):
        layer = quantized_linear(**options)
        before = codes(layer)
        assert cast(layer) is layer
        assert_same_codes(layer, before)
        assert layer.bias.dtype == layer.quantized.dtype == dtype
        assert layer.quantized.dequantize().dtype == dtype

    def test_double_keeps_a_dtype_the_format_has(self):
        layer = quantized_linear()
        before = codes(layer)
        layer.double()
        assert_same_codes(layer, before)
        assert layer.quantized.dtype == torch.float32

    def test_type_is_refused_and_harmless(self):
        layer = quantized_linear()
        before = codes(layer)
        with pytest.raises(TypeError, match="weight: holds packed codes"):
            layer.type(torch.float16)
        with pytest.raises(TypeError, match="holds packed codes or bits"):
            layer.type(torch.uint8)
        with pytest.raises(TypeError, match="floating point"):
            layer.to(torch.uint8)
        assert_same_codes(layer, before)

    def test_failed_move_restores_the_parameters(self):
        layer = quantized_linear()
        before = codes(layer)

        def fail(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is layer.nested_offset:
                raise MemoryError
            return tensor if tensor.is_floating_point() else tensor + 1

        for swap in (False, True):
            torch.__future__.set_swap_module_params_on_conversion(swap)
            try:
                with pytest.raises(MemoryError):
                    layer._apply(fail)
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)
            assert_same_codes(layer, before)

    def test_moves_with_its_device(self):
        layer = quantized_linear().to("meta")
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
        assert layer.quantized.device.type == "meta"

    @pytest.mark.parametrize("options", FORMATS)
    def test_copies_and_pickles(self, options):
        layer = quantized_linear(**options)
        x = torch.randn(3, 100)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))
            assert_same_codes(other, codes(layer))
            assert other.weight.data_ptr() != layer.weight.data_ptr()

    def test_from_quantized_shares(self):
        qw = qkern.quantize_4bit(torch.randn(8, 64))
        bias = nn.Parameter(torch.zeros(8))
        layer = qnn.Linear4bit.from_quantized(qw, bias)
        assert layer.weight.data_ptr() == qw.packed.data_ptr()
        assert layer.quantized.absmax.data_ptr() == qw.absmax.data_ptr()
        assert layer.bias is bias
        assert not qnn.Linear4bit.from_quantized(qw, torch.zeros(8)).bias.requires_grad

    def test_from_quantized_refuses_what_does_not_fit(self):
        qw = qkern.quantize_4bit(torch.randn(8, 64))
        with pytest.raises(ValueError, match=r"bias: got shape \(7,\); takes \[8\]"):
            qnn.Linear4bit.from_quantized(qw, torch.zeros(7))
        with pytest.raises(ValueError, match="qw: got shape"):
            qnn.Linear4bit.from_quantized(qkern.quantize_4bit(torch.randn(64)))

    def test_from_linear_keeps_bias_and_mode(self):
        dense = nn.Linear(64, 8).eval()
        layer = qnn.Linear4bit.from_linear(dense)
        assert layer.bias is dense.bias
        assert not layer.training

    def test_from_linear_refuses_what_is_not_finite(self):
        dense = nn.Linear(64, 8)
        nn.init.constant_(dense.weight, float("inf"))
        with pytest.raises(ValueError, match="block 0"):
            qnn.Linear4bit.from_linear(dense)
        assert qnn.Linear4bit.from_linear(dense, check_finite=False).absmax.dtype == torch.uint8

    def test_reset_parameters_is_refused(self):
        with pytest.raises(TypeError, match="no parameters to reset"):
            quantized_linear().reset_parameters()

    def test_constructor_refuses_other_dtypes(self):
        with pytest.raises(TypeError, match="float64"):
            qnn.Linear4bit(64, 8, dtype=torch.float64)

    def test_repr_tells_the_format(self):
        assert "format=fp4, block_size=32, double_quant=True" in repr(
            quantized_linear(format="fp4", block_size=32)
        )

    def test_autocast_equals_cast_inputs(self):
        layer = quantized_linear()
        x = torch.randn(4, 100, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, copy.deepcopy(layer).bfloat16()(x.detach().bfloat16()))
        y.sum().backward()
        assert x.grad.dtype == torch.float32

    def test_inference_mode(self):
        layer = quantized_linear()
        x = torch.randn(4, 100)
        with torch.inference_mode():
            y = layer(x)
        assert torch.equal(y, layer(x))


def lora_pair(base: nn.Module, dropout: float = 0.0, **options):
    """A LoRALinear with a B that is not zero."""
    layer = qnn.LoRALinear(base, 8, 16, dropout, **options)
    nn.init.normal_(layer.lora_b, std=0.05)
    return layer


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    return layer.quantized.dequantize() if isinstance(layer, qnn.Linear4bit) else layer.weight


def peft_twin(layer: qnn.LoRALinear, dtype: torch.dtype = torch.float32) -> nn.Module:
    """PEFT's layer with the same A and B on the dense (dequantised) base."""
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(dense_weight(layer.base_layer).to(dtype))
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    config = peft.LoraConfig(
        r=layer.r,
        lora_alpha=layer.alpha,
        lora_dropout=layer.dropout,
        use_rslora=layer.use_rslora,
        target_modules=["0"],
    )
    twin = peft.get_peft_model(nn.Sequential(dense), config)
    state = {
        "base_model.model.0.lora_A.weight": layer.lora_a.detach(),
        "base_model.model.0.lora_B.weight": layer.lora_b.detach(),
    }
    peft.set_peft_model_state_dict(twin, state)
    return twin.train(layer.training)


def twin_grads(twin: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    named = dict(twin.named_parameters())
    return tuple(named[f"base_model.model.0.lora_{half}.default.weight"].grad for half in "AB")


BASES = [
    pytest.param(lambda: quantized_linear(), id="4bit"),
    pytest.param(lambda: nn.Linear(100, 70), id="dense"),
]


class TestLoRALinear:
    @pytest.mark.parametrize("make_base", BASES)
    @pytest.mark.parametrize(("dropout", "use_rslora"), [(0.0, False), (0.3, False), (0.0, True)])
    def test_equals_peft(self, make_base, dropout, use_rslora):
        layer = lora_pair(make_base(), dropout, use_rslora=use_rslora).train()
        twin = peft_twin(layer)
        x = torch.randn(2, 5, 100, requires_grad=True)
        x_twin = x.detach().clone().requires_grad_()
        torch.manual_seed(7)
        y = layer(x)
        torch.manual_seed(7)
        y_twin = twin(x_twin)
        torch.testing.assert_close(y, y_twin)
        dy = torch.randn_like(y)
        y.backward(dy)
        y_twin.backward(dy)
        grad_a, grad_b = twin_grads(twin)
        torch.testing.assert_close(x.grad, x_twin.grad)
        torch.testing.assert_close(layer.lora_a.grad, grad_a)
        torch.testing.assert_close(layer.lora_b.grad, grad_b)

    @pytest.mark.parametrize("make_base", BASES)
    def test_equals_peft_under_autocast(self, make_base):
        layer = lora_pair(make_base())
        twin = peft_twin(layer)
        x = torch.randn(6, 100)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, y_twin = layer(x), twin(x)
            y.float().square().sum().backward()
            y_twin.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, y_twin, rtol=2e-2, atol=2e-2)
        for own, other in zip(
            (layer.lora_a.grad, layer.lora_b.grad), twin_grads(twin), strict=True
        ):
            assert own.dtype == torch.float32
            assert (own - other).norm() / other.norm() < 2e-2

    def test_bfloat16_model_with_float32_adapters_is_close_to_peft(self):
        layer = lora_pair(quantized_linear(dtype=torch.bfloat16))
        assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
        twin = peft_twin(layer, torch.bfloat16)
        x = torch.randn(6, 100, dtype=torch.bfloat16)
        y, y_twin = layer(x), twin(x)
        assert y.dtype == y_twin.dtype == torch.bfloat16
        torch.testing.assert_close(y, y_twin, rtol=3e-2, atol=3e-2)

    def test_starts_as_peft_does(self):
        torch.manual_seed(3)
        layer = qnn.LoRALinear(quantized_linear(), 8, 16)
        assert layer.lora_a.shape == (8, 100)
        assert layer.lora_b.shape == (70, 8)
        assert torch.count_nonzero(layer.lora_b) == 0
        # kaiming_uniform_(a=sqrt(5)) draws from [-1/sqrt(in), 1/sqrt(in)].
        assert 0.09 < layer.lora_a.abs().max() <= 0.1
        x = torch.randn(3, 100)
        assert torch.equal(layer(x), layer.base_layer(x))

    def test_scaling(self):
        assert qnn.LoRALinear(quantized_linear(), 8, 16).scaling == 2.0
        assert qnn.LoRALinear(quantized_linear(), 16, 8, use_rslora=True).scaling == 2.0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_adapter_dtype_can_be_chosen(self, dtype):
        layer = qnn.LoRALinear(quantized_linear(dtype=torch.bfloat16), 8, 16, dtype=dtype)
        assert layer.lora_a.dtype == layer.lora_b.dtype == dtype
        layer(torch.randn(3, 100, dtype=torch.bfloat16)).sum().backward()
        assert layer.lora_b.grad.dtype == dtype

    def test_base_is_frozen(self):
        layer = qnn.LoRALinear(nn.Linear(100, 70), 8, 16)
        trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trainable == {"lora_a", "lora_b"}

    def test_passes_for_its_base(self):
        base = quantized_linear()
        layer = qnn.LoRALinear(base, 8, 16)
        assert (layer.in_features, layer.out_features) == (100, 70)
        assert layer.weight is base.weight
        assert layer.quantized.shape == (70, 100)
        assert layer.bias is base.bias
        with pytest.raises(TypeError, match="got a dense layer"):
            _ = qnn.LoRALinear(nn.Linear(100, 70), 8, 16).quantized

    def test_dropout_acts_in_training_only(self):
        layer = lora_pair(quantized_linear(), dropout=0.5)
        x = torch.randn(4, 100)
        layer.train()
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))

    @pytest.mark.parametrize("make_base", BASES)
    def test_merge_and_unmerge(self, make_base):
        layer = lora_pair(make_base()).eval()
        x = torch.randn(4, 100)
        before, state = layer(x), {k: v.clone() for k, v in layer.state_dict().items()}
        delta = layer.scaling * layer.lora_b @ layer.lora_a
        dense = dense_weight(layer.base_layer)
        layer.merge()
        assert layer.merged
        merged = layer._merged[0]
        assert type(merged) is type(layer.base_layer)
        if isinstance(merged, qnn.Linear4bit):
            expected = qkern.quantize_4bit(dense + delta).dequantize()
            assert torch.equal(merged.quantized.dequantize(), expected)
        else:
            expected = dense + delta
            torch.testing.assert_close(merged.weight, expected)
        torch.testing.assert_close(layer(x), F.linear(x, expected, layer.bias))
        with pytest.raises(RuntimeError, match="merged already"):
            layer.merge()
        # Saving a merged layer saves it unmerged.
        assert layer.state_dict().keys() == state.keys()
        layer.unmerge()
        assert torch.equal(layer(x), before)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        with pytest.raises(RuntimeError, match="not merged"):
            layer.unmerge()

    @pytest.mark.parametrize("make_base", BASES)
    def test_merged_weight_follows_casts_and_copies(self, make_base):
        layer = lora_pair(make_base())
        layer.merge()
        layer.bfloat16()
        x = torch.randn(4, 100, dtype=torch.bfloat16)
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(copy.deepcopy(layer)(x), y)
        layer.to("meta")
        assert layer._merged[0].weight.device.type == "meta"
        assert layer._merged[0].bias is layer.bias

    def test_merge_refuses_what_is_not_finite(self):
        for base in (quantized_linear(), nn.Linear(100, 70)):
            layer = lora_pair(base)
            nn.init.constant_(layer.lora_b, float("nan"))
            with pytest.raises(ValueError, match=r"NaN|finite"):
                layer.merge()
            assert not layer.merged

    @pytest.mark.parametrize("merged", [False, True])
    def test_disable(self, merged):
        model = nn.Sequential(lora_pair(quantized_linear()))
        x = torch.randn(4, 100)
        base = model[0].base_layer(x)
        if merged:
            qnn.merge_lora(model)
        with_adapter = model(x)
        with qnn.disable_lora(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), with_adapter)
        assert not torch.equal(with_adapter, base)
        with pytest.raises(KeyError), qnn.disable_lora(model):
            raise KeyError
        assert torch.equal(model(x), with_adapter)

    @pytest.mark.parametrize("make_base", BASES)
    def test_unmerge_lora_restores_every_layer(self, make_base):
        model = nn.Sequential(nn.Sequential(lora_pair(make_base())), lora_pair(nn.Linear(70, 70)))
        with torch.no_grad():
            model[1].lora_b.copy_(torch.randn(70, 8))
        x = torch.randn(4, 100)
        before = model(x)
        qnn.unmerge_lora(model)  # of what is not merged: nothing
        assert torch.equal(model(x), before)
        qnn.merge_lora(model)
        layers = [layer for _, layer in qnn.lora_layers(model)]
        assert [layer.merged for layer in layers] == [True, True]
        held = [layer._merged for layer in layers]
        qnn.merge_lora(model)  # of what is merged: nothing
        assert all(layer._merged is one for layer, one in zip(layers, held, strict=True))
        assert not torch.equal(model(x), before)
        layers[1].unmerge()
        qnn.unmerge_lora(model)
        assert [layer.merged for layer in layers] == [False, False]
        assert torch.equal(model(x), before)
        # Changes of A and B show again.
        with torch.no_grad():
            layers[0].lora_b.zero_()
            layers[1].lora_b.zero_()
        expected = F.linear(x, dense_weight(layers[0].base_layer), layers[0].bias)
        expected = F.linear(expected, layers[1].weight, layers[1].bias)
        torch.testing.assert_close(model(x), expected)

    def test_disabling_nests(self):
        """Each block restores what it found, in whatever order and however it ends."""
        model = nn.Sequential(lora_pair(quantized_linear()), lora_pair(nn.Linear(70, 70)))
        with torch.no_grad():
            model[1].lora_b.copy_(torch.randn(70, 8))
        x = torch.randn(4, 100)
        with_adapter = model(x)
        base = model[1].base_layer(model[0].base_layer(x))
        half = model[1](model[0].base_layer(x))
        with qnn.disable_lora(model):
            assert torch.equal(model(x), base)
            with qnn.disable_lora(model):
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), base)
            with pytest.raises(KeyError), qnn.disable_lora(model[0]):
                raise KeyError
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), with_adapter)
        with qnn.disable_lora(model[0]):
            assert torch.equal(model(x), half)
            with qnn.disable_lora(model):
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), half)
        assert torch.equal(model(x), with_adapter)
        model[1].adapter_enabled = False
        with qnn.disable_lora(model):
            pass
        assert [layer.adapter_enabled for _, layer in qnn.lora_layers(model)] == [True, False]

    @pytest.mark.parametrize("make_base", BASES)
    @pytest.mark.parametrize("merged", [False, True])
    def test_copies_and_pickles_after_use(self, make_base, merged):
        """After a step, with gradients and hooks: bit for bit, and on memory of their own."""
        layer = lora_pair(make_base(), dropout=0.1).train()
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        layer(torch.randn(4, 100)).square().sum().backward()
        optimizer.step()
        with torch.inference_mode():
            layer.eval()(torch.randn(2, 100))
        if merged:
            layer.merge()
        x = torch.randn(3, 100)
        y = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), y)
            assert other.merged == merged
            places = {p.data_ptr() for p in layer.parameters()}
            assert not places & {p.data_ptr() for p in other.parameters()}
            if merged:
                other.unmerge()
            other.train()(x).sum().backward()
            with torch.no_grad():
                other.lora_b.zero_()
            assert torch.equal(layer(x), y)

    @pytest.mark.parametrize("make_base", BASES)
    def test_chunked_and_transposed_gradients(self, make_base):
        """However x and its gradient lie in memory, and in however many pieces they come."""
        layer = lora_pair(make_base())
        layer.base_layer.requires_grad_(False)
        x, dy = torch.randn(6, 4, 100), torch.randn(6, 4, 70)
        weight = dense_weight(layer.base_layer) + layer.scaling * layer.lora_b @ layer.lora_a
        expected = (dy @ weight).detach()

        def gradients(change):
            layer.zero_grad()
            given = x.clone().requires_grad_()
            change(given)
            return given.grad, layer.lora_a.grad, layer.lora_b.grad

        whole = gradients(lambda x: layer(x).backward(dy))
        torch.testing.assert_close(whole[0], expected, rtol=1e-4, atol=1e-4)
        ways = {
            "chunks": lambda x: torch.cat([layer(part) for part in x.chunk(3)]).backward(dy),
            "chunks of one dimension": lambda x: torch.cat(
                [layer(part) for part in x.chunk(2, dim=1)], dim=1
            ).backward(dy),
            "transposed": lambda x: layer(x.transpose(0, 1)).transpose(0, 1).backward(dy),
            "transposed gradient": lambda x: layer(x).backward(
                dy.transpose(0, 1).contiguous().transpose(0, 1)
            ),
            "gradient of columns": lambda x: layer(x).mT.backward(dy.mT),
            "every second row": lambda x: (layer(x).repeat_interleave(2, 0)[::2]).backward(dy),
        }
        for name, way in ways.items():
            for one, other in zip(gradients(way), whole, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)

    def test_state_dict_round_trip(self):
        layer = lora_pair(quantized_linear())
        other = qnn.LoRALinear(qnn.Linear4bit(100, 70), 8, 16)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(3, 100)
        assert torch.equal(other(x), layer(x))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"r": 0}, ValueError, "r: got 0"),
            ({"r": 1.5}, TypeError, "r: got float"),
            ({"r": True}, TypeError, "r: got bool"),
            ({"alpha": -1}, ValueError, "alpha: got -1"),
            ({"alpha": float("nan")}, ValueError, "alpha: got nan"),
            ({"alpha": "16"}, TypeError, "alpha: got str"),
            ({"dropout": 1.0}, ValueError, r"dropout: got 1.0; takes a probability in \[0, 1\)"),
            ({"dropout": None}, TypeError, "dropout: got NoneType"),
            ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
            ({"dtype": "bf16"}, TypeError, "dtype: got str"),
            ({"rank_pattern": {"q": 0}}, ValueError, "r: got 0"),
            ({"alpha_pattern": {"q": 0}}, ValueError, "alpha: got 0"),
        ],
    )
    def test_hyperparameters_are_checked(self, options, error, message):
        with pytest.raises(error, match=message):
            qnn.LoRAConfig(**options)
        if not options.keys() & {"rank_pattern", "alpha_pattern"}:
            with pytest.raises(error, match=message):
                qnn.LoRALinear(quantized_linear(), **({"r": 8, "alpha": 16} | options))

    def test_other_bases_are_refused(self):
        class Doubled(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        for base in (nn.Conv1d(8, 8, 1), Doubled(8, 8)):
            with pytest.raises(TypeError, match="base_layer: got"):
                qnn.LoRALinear(base, 8, 16)

    def test_peft_wraps_the_4bit_layer_itself(self):
        """PEFT finds Linear4bit as the linear layer it is, so either LoRA can be used."""
        own = lora_pair(quantized_linear())
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
        wrapped = peft.get_peft_model(nn.Sequential(quantized_linear()), config)
        state = {
            "base_model.model.0.lora_A.weight": own.lora_a.detach(),
            "base_model.model.0.lora_B.weight": own.lora_b.detach(),
        }
        peft.set_peft_model_state_dict(wrapped, state)
        x = torch.randn(3, 100)
        torch.testing.assert_close(wrapped(x), own(x))


class TestEmbedding4bit:
    @pytest.mark.parametrize("options", FORMATS)
    # Rows of whole blocks; rows that begin inside one; odd rows, in an odd table with a short end.
    @pytest.mark.parametrize(("rows", "dim"), [(50, 128), (50, 48), (40, 80), (37, 33), (3, 5)])
    def test_equals_indexing_the_dequantised_table(self, options, rows, dim):
        torch.manual_seed(0)
        table = nn.Embedding(rows, dim)
        layer = qnn.Embedding4bit.from_embedding(table, **options)
        expected = layer.quantized.dequantize()
        assert torch.equal(expected, qkern.quantize_4bit(table.weight, **options).dequantize())
        for ids in (torch.arange(rows), torch.randint(rows, (2, 3, 4)), torch.tensor(rows - 1)):
            assert torch.equal(layer(ids), expected[ids])
            assert torch.equal(layer(ids.int()), expected[ids])

    def test_nested_scales_beyond_one_group(self):
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(300, 128))
        assert layer.nested_absmax.numel() > 2
        ids = torch.randperm(300)
        assert torch.equal(layer(ids), layer.quantized.dequantize()[ids])

    def test_no_ids(self):
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(10, 64))
        assert layer(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 64)

    def test_bad_ids(self):
        # 7 rows of 33 end inside a block, which a row too far would still find.
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(7, 33))
        for bad in (-1, 7, 1000):
            with pytest.raises(IndexError, match=r"ids: got values from .* takes 0 to 6"):
                layer(torch.tensor([0, bad]))
        with pytest.raises(TypeError, match=r"ids: got torch.float32; takes integers"):
            layer(torch.tensor([0.0]))

    def test_dtype_follows_the_module(self):
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(7, 33))
        before = codes(layer)
        layer.bfloat16()
        assert_same_codes(layer, before)
        ids = torch.arange(7)
        assert torch.equal(layer(ids), layer.quantized.dequantize(torch.bfloat16))

    def test_frozen_with_padding_row(self):
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(10, 64, padding_idx=3))
        assert not any(p.requires_grad for p in layer.requires_grad_().parameters())
        assert list(layer.buffers()) == []
        assert torch.count_nonzero(layer(torch.tensor([3]))) == 0

    def test_state_dict_round_trip(self):
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(37, 33))
        other = qnn.Embedding4bit.from_embedding(nn.Embedding(37, 33))
        assert not torch.equal(other.weight, layer.weight)
        other.load_state_dict(layer.state_dict())
        assert_same_codes(other, codes(layer))

    def test_a_given_codebook_is_copied(self, tmp_path):
        codebook = torch.linspace(-1, 1, 16)
        model = nn.Sequential(
            *(
                qnn.Embedding4bit.from_embedding(nn.Embedding(8, 64), "custom", codebook=codebook)
                for _ in range(2)
            )
        )
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        codebook.zero_()
        assert torch.count_nonzero(model[0](torch.tensor([1]))) > 0

    @pytest.mark.parametrize("name", ["weight", "absmax", "nested_absmax", "nested_offset"])
    def test_parameters_that_do_not_fit_are_refused_by_the_lookup(self, name):
        ids = torch.tensor([1, 36])
        for change, error, message in (
            (lambda t: torch.cat([t, t]), ValueError, "elements; takes"),
            (lambda t: t.view(torch.int8), TypeError, r"got torch.int8; takes torch\.\w+ or its"),
        ):
            layer = qnn.Embedding4bit.from_embedding(nn.Embedding(37, 33))
            before = getattr(layer, name)
            before.data = change(before.data)
            with pytest.raises(error, match=f"{name}: .*{message}"):
                layer(ids)
        layer = qnn.Embedding4bit.from_embedding(
            nn.Embedding(37, 33), "custom", codebook=torch.linspace(-1, 1, 16)
        )
        layer.codebook.data = layer.codebook.data[:15]
        with pytest.raises(ValueError, match="codebook: got 15 elements; takes 16"):
            layer(ids)

    @pytest.mark.parametrize(("rows", "dim"), [(50, 128), (37, 33), (3, 5), (1, 1)])
    @pytest.mark.parametrize(("block_size", "double_quant"), [(64, True), (64, False), (128, True)])
    def test_size_of_what_is_held(self, rows, dim, block_size, double_quant):
        """Whole blocks of packed codes and a scale for each, and no byte more."""
        layer = qnn.Embedding4bit.from_embedding(
            nn.Embedding(rows, dim), block_size=block_size, double_quant=double_quant
        )
        blocks = -(-rows * dim // block_size)
        expected = {
            "weight": blocks * block_size // 2,
            "absmax": blocks * (1 if double_quant else 4),
        }
        if double_quant:
            expected |= {"nested_absmax": 4 * -(-blocks // 256), "nested_offset": 4}
        found = dict(layer.named_parameters())
        assert {n: p.nbytes for n, p in found.items() if n != "quant_meta"} == expected
        for name, size in expected.items():
            assert found[name].untyped_storage().nbytes() == size, name
        assert not list(layer.buffers())
        # What `quantized` shows is without the padding.
        assert layer.quantized.packed.numel() == -(-rows * dim // 2)

    def test_max_norm_is_refused(self):
        with pytest.raises(ValueError, match="max_norm"):
            qnn.Embedding4bit.from_embedding(nn.Embedding(10, 64, max_norm=1.0))

    def test_memory_of_a_lookup_does_not_grow_with_the_table(self):
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(20000, 64))
        ids = torch.tensor([5])
        with torch.profiler.profile(profile_memory=True) as profile:
            layer(ids)
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
        assert 0 < allocated < 20000

    @pytest.mark.parametrize("format", ["nf4", "custom"])
    def test_a_freed_storage_is_refused_by_name(self, format: str) -> None:
        """Frameworks free what they gathered. torch would read at address 0, and crash."""
        codebook = torch.linspace(-1, 1, 16) if format == "custom" else None
        for double_quant in (True, False):
            table = qnn.Embedding4bit.from_embedding(
                nn.Embedding(50, 33), format, double_quant=double_quant, codebook=codebook
            )
            for name, parameter in table.named_parameters():
                if name == "quant_meta":
                    continue
                freed = copy.deepcopy(table)
                freed.get_parameter(name).untyped_storage().resize_(0)
                takes = (
                    rf"^{name}: got a tensor whose storage has 0 bytes.*{parameter.nbytes} bytes"
                )
                with pytest.raises(ValueError, match=takes):
                    freed(torch.tensor([1]))
                if name == "weight":
                    with pytest.raises(ValueError, match=takes):
                        _ = freed.quantized

    @pytest.mark.parametrize(("dim", "block_size"), [(64, 64), (100, 64), (48, 64), (32, 256)])
    def test_a_lookup_decodes_as_many_blocks_as_a_row_may_touch(self, dim, block_size, monkeypatch):
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(64, dim), block_size=block_size)
        sizes = []
        dequantize = qkern.QuantizedTensor.dequantize

        def recorded(qw, *args, **kwargs):
            sizes.append(qw.numel())
            return dequantize(qw, *args, **kwargs)

        monkeypatch.setattr(qkern.QuantizedTensor, "dequantize", recorded)
        layer(torch.tensor([5]))
        starts = range(0, 64 * dim, dim)
        touched = max((start + dim - 1) // block_size - start // block_size + 1 for start in starts)
        assert sizes == [touched * block_size]


class Counted:
    """Counts the dense weights of a model that are alive, through weak references."""

    def __init__(self, model: nn.Module) -> None:
        self.references = [
            weakref.ref(module.weight) for module in model.modules() if type(module) is nn.Linear
        ]

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)


class TestQuantizeModel:
    def test_replaces_every_linear_but_the_head(self):
        model = tiny_llama()
        assert qnn.quantize_model(model) is model
        kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert kinds.pop("lm_head") is nn.Linear
        assert len(kinds) == 14
        assert set(kinds.values()) == {qnn.Linear4bit}
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.model.layers[0].mlp.up_proj.training

    def test_equals_the_dequantised_model(self):
        model, dense = qnn.quantize_model(tiny_llama()), tiny_llama()
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, qnn.Linear4bit):
                    dense.get_submodule(name).weight.copy_(module.quantized.dequantize())
        ids = torch.randint(128, (2, 16))
        torch.testing.assert_close(model(ids).logits, dense(ids).logits)

    def test_releases_each_dense_weight_before_the_next(self, monkeypatch):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
        counted = Counted(model)
        alive = []
        original = qnn.Linear4bit.from_linear.__func__

        def spy(cls, *args, **kwargs):
            alive.append(counted.alive())
            return original(cls, *args, **kwargs)

        monkeypatch.setattr(qnn.Linear4bit, "from_linear", classmethod(spy))
        # Releasing must not wait for the garbage collector.
        gc.disable()
        try:
            qnn.quantize_model(model, lora=qnn.LoRAConfig(r=2))
        finally:
            gc.enable()
        assert alive == [6, 5, 4, 3, 2, 1]
        assert counted.alive() == 0

    @pytest.mark.parametrize(
        ("targets", "count"),
        [
            (["q_proj"], 2),
            (["q_proj", "v_proj"], 4),
            (["layers.1.self_attn.q_proj"], 1),
            (["model.layers.0.mlp.up_proj"], 1),
            (r".*\.layers\.0\..*_proj", 7),
            ("all-linear", 14),
        ],
    )
    def test_targets(self, targets, count):
        model = qnn.quantize_model(tiny_llama(), targets=targets)
        assert sum(isinstance(m, qnn.Linear4bit) for m in model.modules()) == count

    @pytest.mark.parametrize(
        ("skip", "count"), [((), 15), (["down_proj"], 13), (["layers.0"], 8), (["mlp"], 9)]
    )
    def test_skip(self, skip, count):
        """``count`` linear layers are not named; the head among them stays dense all the same."""
        model = qnn.quantize_model(tiny_llama(), skip=skip)
        assert type(model.lm_head) is nn.Linear
        assert sum(isinstance(m, qnn.Linear4bit) for m in model.modules()) == count - 1

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"targets": ["q_proj", "oops"]}, ValueError, "'oops' matches no .* has .*down_proj"),
            ({"targets": ["proj"]}, ValueError, "'proj' matches no linear layer"),
            ({"targets": "q_proj"}, ValueError, "matches no linear layer"),
            (
                {"targets": ["lm_head"], "skip": ["lm_head"]},
                ValueError,
                "lm_head, which is in skip",
            ),
            ({"targets": ["self_attn"]}, TypeError, "self_attn is a LlamaAttention"),
            ({"skip": "lm_head"}, TypeError, "skip: got the string"),
            ({"skip": ["model", "lm_head"]}, ValueError, "no linear layer outside skip"),
            ({"block_size": 48}, ValueError, r"layers.0.self_attn.q_proj: block_size: got 48"),
            ({"format": "nf5"}, ValueError, "format: got 'nf5'"),
            ({"lora": qnn.LoRAConfig(targets=["oops"])}, ValueError, "lora.targets: 'oops'"),
        ],
    )
    def test_errors(self, options, error, message):
        with pytest.raises(error, match=message):
            qnn.quantize_model(tiny_llama(), **options)

    def test_subclasses_of_linear_are_left_alone(self):
        attention = nn.MultiheadAttention(32, 4, batch_first=True)
        model = nn.ModuleDict({"attention": attention, "out": nn.Linear(32, 32)})
        qnn.quantize_model(model)
        assert isinstance(model["out"], qnn.Linear4bit)
        x = torch.randn(1, 3, 32)
        assert model["attention"](x, x, x)[0].shape == x.shape
        with pytest.raises(TypeError, match="is a NonDynamicallyQuantizableLinear"):
            qnn.quantize_model(
                nn.ModuleDict({"a": attention, "b": nn.Linear(4, 4)}), targets=["out_proj"]
            )

    def test_a_single_layer_is_refused(self):
        with pytest.raises(TypeError, match=r"use Linear4bit.from_linear"):
            qnn.quantize_model(nn.Linear(8, 8))

    def test_not_finite_names_the_layer(self):
        model = tiny_llama()
        nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, float("nan"))
        with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: .*block 0"):
            qnn.quantize_model(model)

    def test_shared_layer_stays_shared(self):
        linear = nn.Linear(32, 32)
        model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
        qnn.quantize_model(model, lora=qnn.LoRAConfig(r=2))
        assert model["a"] is model["b"][0]
        assert isinstance(model["a"], qnn.LoRALinear)
        assert isinstance(model["a"].base_layer, qnn.Linear4bit)

    def test_layers_that_share_a_weight_share_its_codes(self):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        model[1].weight = model[0].weight
        bias = model[1].bias
        qnn.quantize_model(model)
        for name in ("weight", "absmax", "nested_absmax", "nested_offset", "quant_meta"):
            assert getattr(model[0], name) is getattr(model[1], name)
        assert model[1].bias is bias
        assert model[0].bias is not bias

    def test_tied_head_stays_dense_and_tied(self):
        model = tiny_llama(tie=True)
        qnn.quantize_model(model, skip=())
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with pytest.raises(ValueError, match=r"lm_head is also model.embed_tokens.weight"):
            qnn.quantize_model(tiny_llama(tie=True), skip=(), targets=["lm_head"])

    def test_hooks_are_kept(self):
        model = nn.Sequential(nn.Linear(32, 32))
        calls = []
        handle = model[0].register_forward_hook(lambda *_: calls.append(1))
        qnn.quantize_model(model)
        model(torch.randn(1, 32))
        assert calls == [1]
        handle.remove()
        model(torch.randn(1, 32))
        assert calls == [1]

    def test_structure_on_meta_loads_a_saved_model(self, tmp_path):
        def make(device: str | None = None) -> nn.Sequential:
            with torch.device(device or "cpu"):
                return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8))

        model = qnn.quantize_model(make())
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        other = qnn.quantize_model(make("meta"))
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
        x = torch.randn(2, 64)
        assert torch.equal(other(x), model(x))

    def test_lora_on_all_linear_and_by_name(self):
        model = qnn.quantize_model(tiny_llama(), lora=qnn.LoRAConfig(r=4))
        assert len(list(qnn.lora_layers(model))) == 14
        parameters = list(qnn.lora_parameters(model))
        assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
        named = qnn.LoRAConfig(
            r=4, targets=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"0.*": 8}
        )
        model = qnn.quantize_model(tiny_llama(), targets=["q_proj"], lora=named)
        layers = dict(qnn.lora_layers(model))
        assert len(layers) == 4
        q = layers["model.layers.0.self_attn.q_proj"]
        assert (q.r, q.alpha) == (2, 8)
        v = layers["model.layers.1.self_attn.v_proj"]
        assert (v.r, v.alpha) == (4, 16)
        assert type(v.base_layer) is nn.Linear

    def test_lora_twice_is_refused(self):
        model = qnn.quantize_model(tiny_llama(), lora=qnn.LoRAConfig(r=4))
        with pytest.raises(ValueError, match=r"model: has LoRA already, at model.layers.0"):
            qnn.add_lora(model, qnn.LoRAConfig(r=4))


def lora_llama(**options) -> LlamaForCausalLM:
    model = qnn.quantize_model(tiny_llama(), lora=qnn.LoRAConfig(r=4, **options))
    for _, layer in qnn.lora_layers(model):
        nn.init.normal_(layer.lora_b, std=0.05)
    return model


def grads(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in qnn.lora_parameters(model)]
    model.zero_grad()
    return found


class TestTraining:
    def test_model_gradients_equal_peft(self):
        model = lora_llama()
        dense = tiny_llama()
        state = {}
        with torch.no_grad():
            for name, layer in qnn.lora_layers(model):
                dense.get_submodule(name).weight.copy_(layer.quantized.dequantize())
                state[f"base_model.model.{name}.lora_A.weight"] = layer.lora_a.detach()
                state[f"base_model.model.{name}.lora_B.weight"] = layer.lora_b.detach()
        config = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        twin = peft.get_peft_model(dense, config)
        peft.set_peft_model_state_dict(twin, state)
        ids = torch.randint(128, (2, 16))
        own, other = model(ids, labels=ids), twin(ids, labels=ids)
        torch.testing.assert_close(own.logits, other.logits)
        own.loss.backward()
        other.loss.backward()
        named = dict(twin.named_parameters())
        for name, layer in qnn.lora_layers(model):
            for half, parameter in (("A", layer.lora_a), ("B", layer.lora_b)):
                expected = named[f"base_model.model.{name}.lora_{half}.default.weight"].grad
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, use_reentrant):
        model = lora_llama(dropout=0.1).train()
        ids = torch.randint(128, (2, 16))
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        expected = grads(model)
        qnn.prepare_for_training(model, use_reentrant=use_reentrant)
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        assert all(map(torch.equal, grads(model), expected))

    def test_checkpoint_recomputes_a_plain_block(self):
        layer = lora_pair(quantized_linear())
        x = torch.randn(4, 100, requires_grad=True)
        layer(x).square().sum().backward()
        expected = (x.grad, layer.lora_a.grad, layer.lora_b.grad)
        x.grad = None
        layer.zero_grad()
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        assert all(map(torch.equal, (x.grad, layer.lora_a.grad, layer.lora_b.grad), expected))

    def test_accumulation_adds_up(self):
        model = lora_llama()
        ids = torch.randint(128, (4, 16))
        parts = []
        for half in ids.chunk(2):
            model(half, labels=half).loss.backward()
            parts.append(grads(model))
        for half in ids.chunk(2):
            model(half, labels=half).loss.backward()
        for total, first, second in zip(grads(model), *parts, strict=True):
            torch.testing.assert_close(total, first + second)

    def test_prepare_for_training(self):
        model = lora_llama()
        assert qnn.prepare_for_training(model) is model
        assert model.training
        assert model.model.layers[0].gradient_checkpointing
        with pytest.raises(ValueError, match="add LoRA first"):
            qnn.prepare_for_training(qnn.quantize_model(tiny_llama()))
        qnn.merge_lora(model)
        with pytest.raises(ValueError, match=r"model: the adapter at model.* is merged"):
            qnn.prepare_for_training(model)
        with pytest.raises(TypeError, match="gradient_checkpointing_enable"):
            qnn.prepare_for_training(nn.Sequential(lora_pair(quantized_linear())))

    def test_a_few_steps_reduce_the_loss_and_leave_the_base(self):
        model = qnn.quantize_model(tiny_llama(), lora=qnn.LoRAConfig(r=8, alpha=32))
        before = codes(model)
        optimizer = torch.optim.AdamW(qnn.lora_parameters(model), lr=1e-2)
        torch.manual_seed(0)
        ids = torch.randint(128, (2, 16))
        losses = []
        for _ in range(12):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.5
        assert_same_codes(model, before)

    @pytest.mark.parametrize("make_base", BASES)
    def test_compile_gives_equal_results_without_a_break(self, make_base):
        layer = lora_pair(make_base())
        compiled = torch.compile(layer, fullgraph=True)
        x = torch.randn(4, 100, requires_grad=True)
        results = []
        for function in (layer, compiled):
            y = function(x)
            y.square().sum().backward()
            results.append((y, x.grad, *grads(layer)))
            x.grad = None
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)

    def test_embedding_compiles(self):
        layer = qnn.Embedding4bit.from_embedding(nn.Embedding(37, 33))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        ids = torch.randint(37, (2, 5))
        assert torch.equal(compiled(ids), layer(ids))


@pytest.mark.parametrize("kinds", [["forward_pre"], ["forward"], ["forward_pre", "forward"]])
def test_an_encoder_layer_keeps_off_its_fast_path_when_hooks_are_gone(kinds: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 2, 128, 0.0, batch_first=True)).eval()
    layers = (model[0].linear1, model[0].linear2)
    names = [f"register_{kind}_hook" for kind in kinds]
    handles = [getattr(layer, name)(lambda *_: None) for layer in layers for name in names]
    qnn.quantize_model(model, skip=["self_attn"])
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(x)
        for handle in handles:
            handle.remove()
        assert torch.equal(copy.deepcopy(model)(x), expected)


def test_a_transformer_encoder_layer_keeps_off_its_dense_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True).eval()
    dense = copy.deepcopy(layer)
    for name in ("linear1", "linear2"):
        quantised = qkern.nn.Linear4bit.from_linear(getattr(layer, name))
        setattr(layer, name, quantised)
        getattr(dense, name).weight.data = quantised.quantized.dequantize()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
