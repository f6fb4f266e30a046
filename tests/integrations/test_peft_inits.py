"""Initialisations that take the weight apart, and LoftQ."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkern.integrations._peft_dora import dense_rows, row_norms
from qkern.integrations._peft_inits import loftq, low_rank
from qkern.nn import Linear4bit, quantize_model
from tests.integrations.twins import IDS, error, linears, quantized, shake
from tests.models import tiny_llama

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

pytest_plugins = "tests.integrations.peft_fixtures"
pytestmark = pytest.mark.usefixtures("qkern_peft")

KINDS = ("pissa", "pissa_niter_8", "olora")


def config(init: Any, **options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 8, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": init}
        | options
    )


def effective(layer: Any) -> Tensor:
    """The weight that base and adapter are together."""
    base = layer.get_base_layer().quantized.dequantize(torch.float32)
    return base + layer.get_delta_weight("default")


def weights() -> dict[str, Tensor]:
    """The dense weights of the model that `quantized` quantises."""
    model = tiny_llama(num_hidden_layers=1)
    return {n: m.weight.detach() for n, m in model.named_modules() if type(m) is nn.Linear}


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_adapter_are_the_weight_but_for_quantising_the_rest(kind: str) -> None:
    model = quantized()
    before = {name: layer.quantized.dequantize() for name, layer in linears(model)}
    model = get_peft_model(model, config(kind))
    for name, weight in before.items():
        layer = model.get_base_model().get_submodule(name)
        delta = layer.get_delta_weight("default")
        assert error(delta, weight) < 0.99, "the adapter holds nothing of the weight"
        rest = weight - delta
        base = layer.base_layer.quantized.dequantize()
        assert error(base, rest) < 0.11
        assert float((effective(layer) - weight).norm() / weight.norm()) < 0.11


def test_principal_vectors_are_those_of_the_dense_layer() -> None:
    model = quantized()
    twin = nn.Linear(64, 64, bias=False)
    path = "model.layers.0.self_attn.q_proj"
    twin.weight.data = model.get_submodule(path).quantized.dequantize()
    mine = get_peft_model(model, config("pissa", target_modules=["q_proj"]))
    theirs = get_peft_model(nn.Sequential(twin), config("pissa", target_modules=["0"]))
    layers = [mine.get_base_model().get_submodule(path), theirs.base_model.model[0]]
    deltas = [layer.get_delta_weight("default") for layer in layers]
    assert error(*deltas) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_original_weights_quantising_happens_once(kind: str, qkern_peft: Any) -> None:
    originals = weights()
    errors: list[float] = []
    for known in (False, True):
        torch.manual_seed(0)
        if known:
            with qkern_peft.original_weights({f"{n}.weight": w for n, w in originals.items()}):
                model = get_peft_model(quantized(), config(kind))
        else:
            model = get_peft_model(quantized(), config(kind))
        layers = {n: model.get_base_model().get_submodule(n) for n in originals if "layers" in n}
        errors.append(
            sum(float((effective(m) - originals[n]).norm() ** 2) for n, m in layers.items())
        )
    assert errors[1] < 0.9 * errors[0]
    assert all(torch.equal(w, originals[n]) for n, w in weights().items()), "they were written to"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error:default. is saved without its base")
def test_an_adapter_that_changed_the_base_comes_back(kind: str, tmp_path: Path) -> None:
    base = quantized()
    torch.manual_seed(1)
    model = shake(get_peft_model(base, config(kind))).eval()
    model.save_pretrained(tmp_path)
    base = quantized()
    torch.manual_seed(2)  # other random numbers than before
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_base_that_loading_cannot_make_again_is_warned_of(
    qkern_peft: Any, tmp_path: Path
) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    with qkern_peft.original_weights(dense):
        model = shake(get_peft_model(quantized(), config("pissa"))).eval()
    with pytest.warns(UserWarning, match="default: is saved without its base.*original weights"):
        model.save_pretrained(tmp_path)
    with qkern_peft.original_weights(dense):
        again = PeftModel.from_pretrained(quantized(), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    other = PeftModel.from_pretrained(quantized(), tmp_path)
    assert error(other(IDS).logits, model(IDS).logits) > 0.02


def test_a_changed_base_needs_an_adapter_with_numbers(tmp_path: Path) -> None:
    get_peft_model(quantized(), config("pissa")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="low_cpu_mem_usage: got True with an init_lora_weights"):
        PeftModel.from_pretrained(quantized(), tmp_path, low_cpu_mem_usage=True)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_converted_to_plain_lora_it_works_on_the_base_as_it_was(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(quantized(), config(kind)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = kind
    before = {
        n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "lora_A")
    }
    shake(model)
    after = {
        n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "lora_A")
    }
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    plain = PeftModel.from_pretrained(quantized(), tmp_path / "plain")
    found = {
        n: m.get_delta_weight("default") for n, m in plain.named_modules() if hasattr(m, "lora_A")
    }
    assert len(found) == 7
    for name, delta in found.items():
        assert error(delta, after[name] - before[name]) < 1e-4
    assert torch.equal(
        next(linears(plain))[1].quantized.dequantize(),
        next(linears(quantized()))[1].quantized.dequantize(),
    )


def test_corda_uses_what_was_prepared_on_the_dense_layer() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96, bias=False))
    u, values, vh = torch.linalg.svd(dense[0].weight.detach(), full_matrices=False)
    dense[0].eigens = SimpleNamespace(U_WC=u[:, :4], S_WC=values[:4], V_WC=vh[:4].T)
    model = nn.Sequential(Linear4bit.from_linear(dense[0]))
    weight = model[0].quantized.dequantize()
    chosen = config(
        "corda", r=4, target_modules=["0"], corda_config=peft.tuners.lora.config.CordaConfig()
    )
    layer = get_peft_model(model, chosen).base_model.model[0]
    assert not hasattr(layer.base_layer, "eigens")
    assert error(layer.get_delta_weight("default"), weight) < 0.99
    assert error(effective(layer), weight) < 0.11


def test_what_changes_the_base_is_refused_while_it_is_merged() -> None:
    model = shake(get_peft_model(quantized(), config(True)))
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="init_lora_weights: changes the base weight"):
        model.add_adapter("second", config("pissa"))


def test_eva_sets_the_factors_from_the_inputs() -> None:
    model = get_peft_model(
        quantized(), config("eva", eva_config=peft.EvaConfig(rho=1.0)), low_cpu_mem_usage=True
    )
    batches = [{"input_ids": torch.randint(0, 128, (8, 24))} for _ in range(4)]
    peft.initialize_lora_eva_weights(model, batches)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert {type(m).__name__ for m in layers} == {"QKernLinear"}
    for layer in layers:
        a = layer.lora_A.default.weight
        product = a @ a.T
        assert torch.allclose(product, torch.eye(len(a)), atol=1e-3), "rows are orthonormal"
        assert not layer.lora_B.default.weight.any()


# LoftQ.


def test_factors_of_low_rank_are_the_nearest() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(40, 30)
    a, b = low_rank(matrix, 5)
    values = torch.linalg.svdvals(matrix)
    assert torch.allclose((matrix - b @ a).norm(), values[5:].norm(), rtol=1e-4)
    a, b = low_rank(matrix, 64)
    assert a.shape == (64, 30)
    assert b.shape == (40, 64)
    assert error(b @ a, matrix) < 1e-5


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_loftq_is_nearer_than_quantising_and_never_worse_with_time(format: str) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(128, 96, bias=False)
    like = Linear4bit.from_linear(dense, format).quantized
    weight = dense.weight.detach()
    last = float((weight - like.dequantize()).norm())
    for iterations in (1, 2, 5):
        q, a, b = loftq(weight, like, 8, iterations)
        assert (q.format, q.block_size, q.double_quant) == (format, 64, True)
        now = float((weight - q.dequantize() - b @ a).norm())
        assert now <= last * (0.95 if iterations == 1 else 1.0)
        last = now


def test_loftq_brings_back_what_a_trained_weight_lost() -> None:
    import loftq as script

    try:
        path = script.weights_file()
    except ImportError as error:
        pytest.skip(str(error))
    weights = [weight for _, weight in zip(range(2), script.linear_weights(path), strict=False)]
    alone = script.relative_error([w for _, w in weights], 0, 0)
    assert 0.08 < alone < 0.11
    once, often = (script.relative_error([w for _, w in weights], 16, n) for n in (1, 4))
    assert once < 0.95 * alone
    assert often < once


@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_of_a_model(iterations: int, qkern_peft: Any, tmp_path: Path) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    dense.save_pretrained(tmp_path)
    chosen = config("loftq", loftq_config={"loftq_bits": 4, "loftq_iter": iterations})
    plain = get_peft_model(quantized(), config(True))
    with qkern_peft.original_weights(tmp_path):
        model = get_peft_model(quantized(), chosen)
    for name, weight in weights().items():
        if "layers" in name:
            got = effective(model.get_base_model().get_submodule(name))
            without = effective(plain.get_base_model().get_submodule(name))
            assert error(got, weight) < 0.95 * error(without, weight), name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval().save_pretrained(tmp_path / "adapter")
    assert any("without its base" in str(w.message) for w in caught) == (iterations > 1)
    logits = model(IDS).logits
    if iterations == 1:
        again = PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    else:
        with pytest.raises(ValueError, match="of which the original is not known"):
            PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
        with qkern_peft.original_weights(dense):
            again = PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, logits)


def test_loftq_says_what_it_takes(qkern_peft: Any) -> None:
    chosen = config("loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    with pytest.raises(ValueError, match=r'init_lora_weights: got "loftq" on a 4-bit weight'):
        get_peft_model(quantized(), chosen)
    chosen = config("loftq", loftq_config={"loftq_bits": 8, "loftq_iter": 1})
    with (
        qkern_peft.original_weights(tiny_llama(num_hidden_layers=1)),
        pytest.raises(ValueError, match="loftq_bits: got 8"),
    ):
        get_peft_model(quantized(), chosen)


@pytest.mark.parametrize("scaling", [0.5, 2])
def test_replacing_the_factors_by_loftqs(scaling: float, qkern_peft: Any, tmp_path: Path) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    dense.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = get_peft_model(quantized(), config(True, lora_alpha=8 * scaling))
    codes = {n: layer.weight.clone() for n, layer in linears(model)}
    before = {n: effective(m) for n, m in model.named_modules() if hasattr(m, "lora_A")}
    peft.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"))
    assert len(before) == 7
    for name, was in before.items():
        wanted = dense.get_submodule(name.removeprefix("base_model.model.")).weight
        assert error(effective(model.get_submodule(name)), wanted) < 0.95 * error(was, wanted)
    assert all(torch.equal(layer.weight, codes[n]) for n, layer in linears(model))


def test_a_callback_puts_factors_back(qkern_peft: Any) -> None:
    model = get_peft_model(quantized(), config(True))
    before = {n: p.clone() for n, p in model.named_parameters()}
    asked: list[str] = []

    def refuse(of: nn.Module, name: str) -> bool:
        assert of is model
        asked.append(name)
        return name.endswith("q_proj")

    dense = tiny_llama(num_hidden_layers=1)
    qkern_peft.replace_lora_weights_loftq(model, dense, callback=refuse)
    assert len(asked) == 7
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == 2
    assert all("q_proj.lora_" in n for n in changed)


def test_what_loftq_cannot_replace_is_named(qkern_peft: Any, tmp_path: Path) -> None:
    replace = qkern_peft.replace_lora_weights_loftq
    with pytest.raises(ValueError, match="peft_model: has no LoRA named 'default'"):
        replace(tiny_llama(num_hidden_layers=1), {})
    model = get_peft_model(quantized(), config(True))
    with pytest.raises(KeyError, match="the original weights have none of that name"):
        replace(model, {})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        replace(model, tmp_path)
    with pytest.raises(TypeError, match="source: got int"):
        replace(model, 3)
    path = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"got shape \[2, 3\]; takes \[64, 64\]"):
        replace(model, {path: torch.zeros(2, 3)})
    with pytest.raises(KeyError, match=r"have a\.model.* and b\.model"):
        replace(model, {f"a.{path}": torch.zeros(1), f"b.{path}": torch.zeros(1)})
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        replace(model, {})


def test_originals_are_read_beside_their_index_only(qkern_peft: Any, tmp_path: Path) -> None:
    index = {"weight_map": {"w": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with (
        pytest.raises(ValueError, match=r"got '\.\./other\.safetensors'; takes a file beside"),
        qkern_peft.original_weights(tmp_path),
    ):
        pass


def test_names_may_lack_the_models_prefix(qkern_peft: Any) -> None:
    dense = tiny_llama(num_hidden_layers=1)
    state = {n.removeprefix("model."): t for n, t in dense.state_dict().items()}
    model = get_peft_model(quantized(), config(True))
    qkern_peft.replace_lora_weights_loftq(model, state)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert error(effective(layer), dense.model.layers[0].mlp.up_proj.weight) < 0.09


# DoRA's norms.


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(33, 96), (7, 5), (300, 4160), (1, 1)])
def test_slices_of_rows_are_the_dense_weight(rows: int, columns: int, double_quant: bool) -> None:
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(nn.Linear(columns, rows), double_quant=double_quant)
    want = layer.quantized.dequantize(torch.float32)
    parts = [(where, part.clone()) for where, part in dense_rows(layer.quantized)]
    assert torch.equal(torch.cat([part for _, part in parts]), want)
    assert [where.start for where, _ in parts] == [0, *(where.stop for where, _ in parts[:-1])]
    assert (len(parts) > 1) == (rows * columns * 4 > 4 << 20)
    a, b = torch.randn(3, columns), torch.randn(rows, 3)
    norms = torch.linalg.norm(want + 0.7 * b @ a, dim=1)
    assert torch.allclose(row_norms(layer, a, b, 0.7), norms, rtol=1e-5)


def test_magnitudes_are_trained_and_saved(tmp_path: Path) -> None:
    model = shake(get_peft_model(quantized(), config(True, use_dora=True))).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(), tmp_path)
    assert torch.equal(again(IDS).logits, logits)
    low = PeftModel.from_pretrained(quantized(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(low(IDS).logits, logits)


def test_dropout_of_dora_is_pefts() -> None:
    model = quantized()
    layers: list[Any] = []
    for base in (model, copy.deepcopy(model)):
        path = "model.layers.0.self_attn.q_proj"
        if base is not model:
            linear = nn.Linear(64, 64, bias=False)
            linear.weight.data = base.get_submodule(path).quantized.dequantize()
            base.set_submodule(path, linear)
        chosen = config(True, use_dora=True, lora_dropout=0.3, target_modules=["q_proj"])
        tuned = shake(get_peft_model(base, chosen)).train()
        layers.append(tuned.get_base_model().get_submodule(path))
    assert type(layers[1]) is not type(layers[0])
    results = []
    for layer in layers:
        torch.manual_seed(3)
        layer.lora_magnitude_vector.default.weight.data.mul_(1.2)
        results.append(layer(torch.ones(5, 64)))
    assert error(*results) < 1e-5


def test_originals_are_of_the_block_alone(qkern_peft: Any) -> None:
    from qkern.integrations import _peft_originals as originals

    with qkern_peft.original_weights({}):
        assert originals.current() is not None
    assert originals.current() is None
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model)
    get_peft_model(model, config("pissa", target_modules=["0"]))
