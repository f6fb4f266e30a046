"""examples/transformers_qlora.py runs on both libraries, and its adapter loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("peft")

import transformers_qlora
from peft import PeftModel
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("options", [[], ["--bitsandbytes"]], ids=["qkern", "bitsandbytes"])
def test_it_runs(
    options: list[str],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the tokenizer of bytes makes many tokens of.
    monkeypatch.setattr(transformers_qlora, "topics", {"a": "Python. " * 200})
    monkeypatch.setattr(transformers_qlora, "LENGTH", 32)
    monkeypatch.chdir(tmp_path)
    transformers_qlora.main(["--model", str(tiny_model), "--steps", "5", *options])
    said = capsys.readouterr().out
    assert re.search(r"^\d+ tokens/s, peak memory [\d,]+ MiB$", said, re.MULTILINE)
    output = tmp_path / "runs/transformers_qlora"
    states = json.loads((output / "checkpoint-5/trainer_state.json").read_text())["log_history"]
    losses = [state["loss"] for state in states if "loss" in state]
    assert len(losses) == 5
    dense = AutoModelForCausalLM.from_pretrained(tiny_model)
    tuned = PeftModel.from_pretrained(dense, output)
    assert any(p.any() for name, p in tuned.named_parameters() if "lora_B" in name)
