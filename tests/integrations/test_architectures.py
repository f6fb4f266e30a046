"""Many architectures from a dense directory to a merged one, on qkern and on bitsandbytes.

Loaded in 4 bits, trained with PEFT's LoRA, saved and loaded again with the same bits, made dense
and merged.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.integrations.architectures import ARCHITECTURES, Architecture
from tests.integrations.record import Side, cases

QUICK = ("Llama", "GPT-2", "T5")
STEPS = 4


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def train(model: Any, batch: dict[str, Tensor]) -> list[float]:
    """Some steps on one batch; the losses, the last one after the last step."""
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert adapters, "no adapters"
    assert all(p.requires_grad for p in adapters.values()), "frozen adapters"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model.eval()(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    dead = [n for n, p in adapters.items() if p.grad is None or not p.grad.any()]
    assert not dead, f"no gradient at {dead[0]}"
    return [*losses, model(**batch).loss.item()]


@cases(
    group="Architectures",
    names=ARCHITECTURES,
    argument="architecture",
    slow=tuple(name for name in ARCHITECTURES if name not in QUICK),
)
def test_an_architecture(side: Side, architecture: Architecture, tmp_path: Path) -> None:
    dense = architecture.save(tmp_path / "dense")
    batch = architecture.batch()
    twin = architecture.auto.from_pretrained(dense, dtype=torch.float32)

    side.doing = "loading"
    model = side.load(dense, auto=architecture.auto)
    layers = [name for name, module in model.named_modules() if isinstance(module, side.linear)]
    assert layers, "no layer is in 4 bits"
    before = logits(model, batch)

    side.doing = "saving"
    model.save_pretrained(tmp_path / "4-bit")
    assert_saved_in_4_bits(tmp_path / "4-bit", dense)

    side.doing = "training"
    if isinstance(architecture.targets, list):
        side.note(f"adapters on {' and '.join(architecture.targets)}")
    task = architecture.task if architecture.task in peft.TaskType.__members__ else None
    config = peft.LoraConfig(r=4, target_modules=architecture.targets, task_type=task)
    tuned = peft.get_peft_model(model, config)
    losses = train(tuned, batch)
    assert all(map(math.isfinite, losses)), f"losses {losses}"
    assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"
    trained = logits(tuned, batch)
    assert not torch.equal(trained, before), "training changed nothing"
    tuned.save_pretrained(tmp_path / "adapter")

    side.doing = "loading what was saved"
    again = side.reload(tmp_path / "4-bit", auto=architecture.auto)
    # Memory that a file gave is aligned otherwise, and torch's dense products may round otherwise.
    assert_equal_logits(logits(again, batch), before, 1e-5)
    adapted = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert_same_tensors(adapted, tuned)
    assert_equal_logits(logits(adapted, batch), trained, 1e-5)

    side.doing = "making it dense"
    again = side.load(dense, auto=architecture.auto)
    again = again.dequantize() or again
    assert not [m for m in again.modules() if isinstance(m, side.linear)], "still in 4 bits"
    assert_near(again, twin)

    side.doing = "merging"
    merged = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload()
    assert_equal_logits(logits(merged, batch), trained)
    side.doing = "saving the merged model"
    merged.save_pretrained(tmp_path / "merged")
    last = architecture.auto.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert getattr(last.config, "quantization_config", None) is None, "says it is quantised"
    assert_equal_logits(logits(last, batch), trained)


def assert_near(model: nn.Module, dense: nn.Module) -> None:
    """Same names and shapes, and weights within the error of 4 bits."""
    expected = dict(dense.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys(), "other parameters"
    for name, weight in expected.items():
        shape = found[name].shape
        assert shape == weight.shape, f"{name} is {list(shape)}, was {list(weight.shape)}"
        weight = weight.detach()
        error = float((found[name].detach() - weight).norm() / weight.norm().clamp_min(1e-9))
        assert error < 0.12, f"{name} differs by {error:.2f} of its size"


def assert_same_tensors(model: nn.Module, expected: nn.Module) -> None:
    """The state dicts are equal, bit for bit."""
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys(), "other tensors after saving and loading"
    other = [name for name, t in wanted.items() if not torch.equal(found[name], t)]
    assert not other, f"{len(other)} tensors differ after saving and loading"


def assert_equal_logits(found: Tensor, expected: Tensor, limit: float = 1e-3) -> None:
    """Within what another order of summation gives."""
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference < limit, f"logits differ by {difference:.1e} of the largest"


def assert_saved_in_4_bits(path: Path, dense: Path) -> None:
    """The weights' files are smaller than in float32, and the config says how they are coded."""
    sizes = [sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (path, dense)]
    assert sizes[0] < 0.8 * sizes[1], f"{sizes[0]} bytes, the dense model has {sizes[1]}"
    assert '"quantization_config"' in (path / "config.json").read_text("utf-8"), "config.json"
