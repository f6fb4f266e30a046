"""Small random models of many architectures, as directories that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 16}
GPT2 = {
    "vocab_size": 96,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TWO_STACKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART = TWO_STACKS | {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
T5 = TWO_STACKS | {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 1,
    "num_heads": 4,
}
FRAMES, BINS, PIXELS = 16, 8, 8


class Architecture(NamedTuple):
    """A class of transformers', the sizes of a small one, and what it is for.

    ``task`` is PEFT's, or "IMAGE" or "AUDIO". ``targets`` are PEFT's target modules.
    """

    model: str
    config: str
    sizes: dict[str, Any]
    task: str = "CAUSAL_LM"
    targets: str | list[str] = "all-linear"

    @property
    def auto(self) -> Any:
        """The class."""
        return getattr(transformers, self.model)

    def save(self, path: Path) -> Path:
        """A model with random weights, in float32, as a directory."""
        torch.manual_seed(0)
        model = self.auto(getattr(transformers, self.config)(**self.sizes))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(path)
        return path

    def batch(self) -> dict[str, Tensor]:
        """Inputs with labels, of two samples."""
        ids = torch.arange(3, 19).view(2, 8)
        if self.task == "IMAGE":
            pixels = torch.linspace(-1, 1, 2 * 3 * PIXELS**2).view(2, 3, PIXELS, PIXELS)
            return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
        if self.task == "AUDIO":
            sound = torch.linspace(-1, 1, 2 * BINS * 2 * FRAMES).view(2, BINS, 2 * FRAMES)
            return {"input_features": sound, "labels": ids}
        if self.task == "SEQ_CLS":
            return {"input_ids": ids, "labels": torch.tensor([0, 1])}
        return {"input_ids": ids, "labels": ids}


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "Gemma 2": Architecture("Gemma2ForCausalLM", "Gemma2Config", HEADS),
    "Gemma 3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "Phi-3": Architecture("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "Mistral": Architecture("MistralForCausalLM", "MistralConfig", GROUPED),
    "Falcon": Architecture("FalconForCausalLM", "FalconConfig", SMALL),
    "GPT-2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "OPT": Architecture(
        "OPTForCausalLM", "OPTConfig", SMALL | {"ffn_dim": 128, "word_embed_proj_dim": 64}
    ),
    "Bloom": Architecture("BloomForCausalLM", "BloomConfig", SMALL | {"n_layer": 2, "n_head": 4}),
    "T5": Architecture("T5ForConditionalGeneration", "T5Config", T5, "SEQ_2_SEQ_LM"),
    "BERT": Architecture("BertForSequenceClassification", "BertConfig", SMALL, "SEQ_CLS"),
    "ViT": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in SMALL.items() if k.startswith(("hidden", "inter", "num"))}
        | {"image_size": PIXELS, "patch_size": 4},
        "IMAGE",
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        BART | {"num_mel_bins": BINS, "max_source_positions": FRAMES, "max_target_positions": 32},
        "AUDIO",
    ),
    "Mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        SMALL | {"state_size": 8},
        targets=["in_proj", "x_proj"],  # PEFT takes no out_proj of Mamba's
    ),
    "Phi": Architecture("PhiForCausalLM", "PhiConfig", SMALL),
    "OLMo 2": Architecture("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "Granite": Architecture("GraniteForCausalLM", "GraniteConfig", GROUPED),
    "Cohere": Architecture("CohereForCausalLM", "CohereConfig", GROUPED),
    "StarCoder2": Architecture("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    "BART": Architecture("BartForConditionalGeneration", "BartConfig", BART, "SEQ_2_SEQ_LM"),
    "RoBERTa": Architecture("RobertaForSequenceClassification", "RobertaConfig", SMALL, "SEQ_CLS"),
}
