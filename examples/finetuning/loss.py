"""The loss on target tokens, without ever holding all their logits.

A small model's vocabulary is large: SmolLM2's head gives 49,152 float32 logits a token, 192 KiB,
several times over in softmax and its gradient. So only targets get logits, a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import qkern
from qkern.nn import FrozenLinear, Linear4bit

from .sequences import IGNORE, Batch


class TargetLoss:
    """Summed cross entropy of a batch's targets, for a causal language model.

    `chunked` says whether the model's logits are nothing but its head applied to its decoder's
    output, then scaled and capped as its config says. Then the head is applied to a few targets at
    a time. A comparison on a few tokens finds out; other models take the plain way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config = model.config.get_text_config()
        self.scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self.scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.chunked = self._logits_are_of_the_head()

    @torch.no_grad()
    def _logits_are_of_the_head(self) -> bool:
        head = self.model.get_output_embeddings()
        if type(head) not in (nn.Linear, FrozenLinear, Linear4bit):
            return False
        if head._forward_hooks or head._forward_pre_hooks:
            return False  # they see a call of the head
        device = self.model.device
        ids = torch.arange(8, device=device)[None] % head.out_features
        batch = Batch(ids, torch.ones_like(ids), ids)
        was_training = self.model.training
        self.model.eval()
        logits = head(self._hidden(batch)) * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        expected = self._logits(batch)
        close = 4 * torch.finfo(expected.dtype).eps
        same = torch.allclose(logits, expected, rtol=close, atol=close)
        self.model.train(was_training)
        return same

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The sum over the batch's targets (divide by `batch.targets`), float32, 0-d."""
        labels = batch.labels[:, 1:]
        is_target = labels != IGNORE
        if self.chunked:
            head = self.model.get_output_embeddings()
            return qkern.linear_cross_entropy(
                self._hidden(batch)[:, :-1][is_target],
                head.quantized if isinstance(head, Linear4bit) else head.weight,
                labels[is_target],
                head.bias,
                reduction="sum",
                scale=self.scale,
                softcap=self.softcap,
            )
        logits = self._logits(batch)[:, :-1][is_target]
        return F.cross_entropy(logits.float(), labels[is_target], reduction="sum")

    def _hidden(self, batch: Batch) -> torch.Tensor:
        hidden: torch.Tensor = self.model.get_decoder()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        return hidden

    def _logits(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        return logits
