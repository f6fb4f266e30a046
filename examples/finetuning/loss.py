"""The loss on target tokens, without ever holding all their logits.

A small model's vocabulary is large: SmolLM2's head gives 49,152 float32 logits a token, 192 KiB,
several times over in softmax and its gradient. So only targets get logits, a few rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .sequences import IGNORE, Batch

_ROWS = 128  # of logits at a time: enough to keep a matmul busy


class _HeadCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of a frozen head's logits.

    The gradient of the hidden states is made along with the loss, while a chunk's logits are at
    hand; nothing else is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [rows, hidden_size]
        labels: torch.Tensor,  # [rows]
        weight: torch.Tensor,  # [vocabulary, hidden_size]
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            logits = F.linear(hidden[rows], weight, bias).float()
            log_z = logits.logsumexp(dim=1, keepdim=True)
            target = labels[rows, None]
            total += (log_z - logits.gather(1, target)).sum()
            if gradient is not None:
                # d loss / d logits = softmax - one hot, in the logits' own memory
                softmax = logits.sub_(log_z).exp_()
                softmax.scatter_add_(1, target, torch.full_like(log_z, -1.0))
                gradient[rows] = softmax.to(hidden.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None


class TargetLoss:
    """Summed cross entropy of a batch's targets, for a causal language model with a frozen head.

    `chunked` says whether the model's logits are nothing but its head applied to its decoder's
    output, so that the head can be applied to a few targets at a time. Some architectures scale or
    cap their logits; a comparison on a few tokens finds out, and they take the plain way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.chunked = self._logits_are_plain()

    @torch.no_grad()
    def _logits_are_plain(self) -> bool:
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear or any(p.requires_grad for p in head.parameters()):
            return False
        device = head.weight.device
        ids = torch.arange(8, device=device)[None] % head.out_features
        batch = Batch(ids, torch.ones_like(ids), ids)
        was_training = self.model.training
        self.model.eval()
        plain = torch.equal(head(self._hidden(batch)), self._logits(batch))
        self.model.train(was_training)
        return plain

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The sum over the batch's targets (divide by `batch.targets`), float32, 0-d."""
        labels = batch.labels[:, 1:]
        is_target = labels != IGNORE
        if self.chunked:
            head = self.model.get_output_embeddings()
            hidden = self._hidden(batch)[:, :-1][is_target]
            loss = _HeadCrossEntropy.apply(hidden, labels[is_target], head.weight, head.bias)
            assert isinstance(loss, torch.Tensor)
            return loss
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
