"""Conversations to token ids with a target mask, and these to batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from . import UserError
from .data import Conversation, Turn

IGNORE = -100  # the label torch's cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """One sequence: token ids, and for each whether it is a target."""

    input_ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Truncation:
    """How many sequences lost how many tokens to the length limits."""

    sources: int = 0
    source_tokens: int = 0
    targets: int = 0
    target_tokens: int = 0


def render(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False
) -> list[tuple[str, bool]]:
    """The conversation as text segments, each with whether it is a target.

    The tokenizer's chat template is used where it has one, else Guanaco's plain form. With `ask`
    the last segment opens the assistant's next turn. The end-of-turn token is part of a target.

    Raises ValueError where the template refuses the turns or rewrites earlier ones.
    """
    if tokenizer.chat_template is None:
        return _render_plain(turns, tokenizer, ask=ask)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]

    def apply(count: int, *, generation_prompt: bool) -> str:
        try:
            rendered = tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        assert isinstance(rendered, str)
        return rendered

    segments = []
    done = ""

    def take(text: str, is_target: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise ValueError(
                "the chat template rewrites earlier turns when a later one follows; "
                "give conversations with one answer each"
            )
        if len(text) > len(done):
            segments.append((text[len(done) :], is_target))
        done = text

    for i, turn in enumerate(turns):
        if turn.is_target:
            take(apply(i, generation_prompt=True), False)
            # Templates end a turn with a line break that generation never reaches.
            take(apply(i + 1, generation_prompt=False).rstrip("\n"), True)
    if ask:
        take(apply(len(turns), generation_prompt=True), False)
    return segments


def _render_plain(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, ask: bool
) -> list[tuple[str, bool]]:
    segments = []
    for turn in turns:
        if turn.role == "assistant":
            segments.append(("### Assistant:", False))
            segments.append((f" {turn.text}{tokenizer.eos_token or ''}", turn.is_target))
        else:
            name = "### Human: " if turn.role == "user" else ""
            segments.append((f"{name}{turn.text}\n", False))
    if ask:
        segments.append(("### Assistant:", False))
    return segments


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    source_max_len: int,
    target_max_len: int,
    truncation: Truncation,
) -> Example:
    """Token ids and target mask of one conversation, cut to the limits, counted in `truncation`.

    The source is what comes before the first target; it loses its beginning, because its end leads
    into the answer. The rest counts as the target; it loses its end.
    """
    try:
        segments = render(conversation.turns, tokenizer)
    except ValueError as error:
        raise UserError(f"{conversation.origin}: {error}") from None
    source, rest = _first_token(tokenizer), []
    for text, is_target in segments:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if not rest and not is_target:
            source += ids
        else:
            rest += [(token, is_target) for token in ids]
    if len(source) > source_max_len:
        truncation.sources += 1
        truncation.source_tokens += len(source) - source_max_len
        source = source[-source_max_len:]
    if len(rest) > target_max_len:
        truncation.targets += 1
        truncation.target_tokens += len(rest) - target_max_len
        rest = rest[:target_max_len]
    return Example(
        tuple(source) + tuple(token for token, _ in rest),
        (False,) * len(source) + tuple(is_target for _, is_target in rest),
    )


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """A text as consecutive sequences of `length` tokens, all of them targets."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    chunks = [tuple(ids[i : i + length]) for i in range(0, len(ids), length)]
    # One token predicts nothing.
    return [Example(chunk, (True,) * len(chunk)) for chunk in chunks if len(chunk) > 1]


def encode_prompt(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [1, length] that ask the model for the next answer."""
    text = "".join(segment for segment, _ in render(turns, tokenizer, ask=True))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([_first_token(tokenizer) + ids])


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token where the tokenizer adds one and no chat template would."""
    if tokenizer.chat_template is not None:
        return []
    return [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]


def epoch_batches(
    lengths: Sequence[int], batch_size: int, *, group_by_length: bool, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch as indices: every index once, a function of the arguments alone.

    Length grouping sorts within shuffled runs of 50 batches, so that a batch pads little while its
    neighbours still change from epoch to epoch; the order of the batches is random either way.
    """
    rng = random.Random(f"{seed}-{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if group_by_length:
        run = 50 * batch_size
        order = [
            index
            for start in range(0, len(order), run)
            for index in sorted(order[start : start + run], key=lengths.__getitem__)
        ]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right: all tensors are [batch, longest]."""

    input_ids: torch.Tensor  # int64
    attention_mask: torch.Tensor  # int64, 0 on padding
    labels: torch.Tensor  # int64, `IGNORE` where the loss does not look

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())

    @property
    def targets(self) -> int:
        """Tokens the loss covers: the first of a sequence has nothing to predict it from."""
        return int((self.labels[:, 1:] != IGNORE).sum())


def collate(examples: Sequence[Example], pad_id: int, *, train_on_source: bool) -> Batch:
    """Examples padded to the longest; labels on targets, or on every token of the sequences."""
    longest = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids)
        mask = torch.tensor(example.is_target) | train_on_source
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.where(mask, ids, IGNORE)
    return Batch(input_ids, attention_mask, labels)
