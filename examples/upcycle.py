"""Make a mixture of experts of a Llama model: each expert a copy of its feed-forward layer.

    python examples/upcycle.py OUT [--model DIR] [--experts 4] [--top-k 2] [--seed 0]

Upcycling (arXiv 2212.05055) starts a mixture from a trained dense model. The weights of a token's
experts sum to one, so the mixture computes what the dense model does until the copies are trained
apart. OUT is a Hugging Face directory of a ``MixtralForCausalLM``, as ``finetune.py --model`` takes
it. Without ``--model`` it is made of SmolLM2-135M-Instruct: with 4 experts 373M parameters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from smollm2 import smollm2_dir
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields of a Llama's configuration that are the mixture's."""


def upcycle(dense: LlamaForCausalLM, experts: int, top_k: int, seed: int) -> MixtralForCausalLM:
    """The mixture, in the dense model's dtype. Raises ValueError for numbers that do not fit."""
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: got {top_k}; takes 1 to {experts}, the number of experts")
    config = MixtralConfig(
        **{name: getattr(dense.config, name) for name in _SAME},
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        sliding_window=None,
    )
    torch.manual_seed(seed)  # routers are drawn at random
    model = MixtralForCausalLM(config).to(dense.dtype)
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
            mlp = theirs.mlp
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            ours.mlp.experts.gate_up_proj.copy_(gate_up.expand(experts, -1, -1))
            ours.mlp.experts.down_proj.copy_(mlp.down_proj.weight.expand(experts, -1, -1))
    shared = {k: v for k, v in dense.state_dict().items() if ".mlp." not in k}
    missing, unexpected = model.load_state_dict(shared, strict=False)
    if unexpected or not all(".mlp." in name for name in missing):
        raise ValueError(f"model: got {unexpected}, lacks {missing}; takes a Llama")
    model.tie_weights()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--model", type=Path, help="a Llama's directory; without, SmolLM2")
    parser.add_argument("--experts", type=int, default=4, help="of a layer (4)")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the routers (0)")
    options = parser.parse_args()
    source = options.model or smollm2_dir()
    dense = LlamaForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
    model = upcycle(dense, options.experts, options.top_k, options.seed)
    model.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(options.output)
    print(f"{options.output}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
