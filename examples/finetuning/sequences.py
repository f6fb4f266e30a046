"""Conversations to token ids with a target mask, and these to batches."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from typing import Any

import torch
from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from . import UserError
from .data import Conversation, Turn

IGNORE = -100  # the label torch's cross entropy leaves out
# What a template raises, which is a program, too.
_REFUSED = (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError)


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
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ask: bool = False,
    now: datetime | None = None,
) -> list[tuple[str, bool]]:
    """The conversation as text segments, each with whether it is a target.

    The tokenizer's chat template is used where it has one, else Guanaco's plain form. With `ask`
    the last segment opens the assistant's next turn. The end-of-turn token is part of a target;
    what follows the last target is left out. `now` is what a template writes as the date.

    Raises ValueError where the template refuses the turns or rewrites what an answer follows.
    """
    if tokenizer.chat_template is None:
        return _render_plain(turns, tokenizer, ask=ask)
    text, spans = _render_template(turns, tokenizer, ask=ask, now=now)
    if not ask and spans:
        text = text[: spans[-1][1]]
    segments = []
    done = 0
    for start, end in spans:
        segments += [(text[done:start], False), (text[start:end], True)]
        done = end
    segments.append((text[done:], False))
    return [(segment, is_target) for segment, is_target in segments if segment]


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


def _render_template(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, ask: bool, now: datetime | None
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the chat template writes it, whole, and where its targets are."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        template = _dated(tokenizer.get_chat_template(), now)
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from None
    targets = [i for i, turn in enumerate(turns) if turn.is_target]

    def apply(messages: list[dict[str, str]], *, generation_prompt: bool = False) -> str:
        try:
            rendered = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                chat_template=template,
            )
        except _REFUSED as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        assert isinstance(rendered, str)
        return rendered

    if targets and (blocks := _generation_blocks(messages, template, tokenizer, ask=ask)):
        text, found = blocks
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if len(found) != len(answers):
            raise ValueError(
                f"the chat template marks {len(found)} generations in a conversation of "
                f"{len(answers)} answers"
            )
        return text, [span for i, span in zip(answers, found, strict=True) if i in targets]

    text = apply(messages, generation_prompt=ask)
    spans = []
    for i in targets:
        # Nothing can be asked of a template before the first message: its text is looked for.
        prompt = (
            apply(messages[:i], generation_prompt=True)
            if i
            else text[: _content(text, messages, i, apply)[0]]
        )
        if not text.startswith(prompt):
            raise ValueError(
                "the chat template rewrites earlier turns when a later one follows, or asks for an "
                "answer otherwise than it writes one; give conversations with one answer each"
            )
        # Templates end a turn with a line break that generation never reaches.
        answered = apply(messages[: i + 1])
        if text.startswith(stripped := answered.rstrip("\n")):
            end = len(stripped)
        else:
            # An earlier answer is written otherwise than the last one, say without its reasoning.
            end = _content(text, messages, i, apply, generation_prompt=ask)[1]
            turn_end = answered[_content(answered, messages[: i + 1], i, apply)[1] :].rstrip("\n")
            end += len(turn_end) if text.startswith(turn_end, end) else 0
        spans.append((len(prompt), end))
    return text, spans


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _generation_blocks(
    messages: list[dict[str, str]], template: str, tokenizer: PreTrainedTokenizerBase, *, ask: bool
) -> tuple[str, list[tuple[int, int]]] | None:
    """The conversation, and what its template says that the model writes; None if it does not."""
    if not _GENERATION.search(template):
        return None
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=ask,
            **tokenizer.special_tokens_map,
        )
    except _REFUSED as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
    return texts[0], spans[0]


def _content(
    text: str,
    messages: list[dict[str, str]],
    i: int,
    apply: Callable[..., str],
    **options: bool,
) -> tuple[int, int]:
    """Where the text of message `i` is in `text`: what changes when that message does."""
    said = messages[i]["content"].strip()
    other = next(letter for letter in "xyz" if letter not in (said[:1], said[-1:]))
    message = {**messages[i], "content": other}
    changed = apply([*messages[:i], message, *messages[i + 1 :]], **options)
    start = _agreement(text, changed)
    return start, len(text) - _agreement(text[start:][::-1], changed[start:][::-1])


def _agreement(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements both begin with."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _dated(template: str, now: datetime | None) -> str:
    """The template with `now` for the time at which it is applied.

    A macro takes the place of the function: it knows every string of the template as a format.
    """
    if now is None or "strftime_now" not in template:
        return template
    tokens = Environment().lexer.tokenize(template)
    strings = sorted({str(token.value) for token in tokens if token.type == "string"})
    dates = {string: now.strftime(string) for string in strings if "%" in string}
    unknown = "raise_exception('strftime_now: its format is not written in the template')"
    return (
        "{%- macro strftime_now(format) -%}"
        f"{{%- set dates = {json.dumps(dates)} -%}}"
        f"{{{{- dates[format] if format in dates else {unknown} -}}}}"
        "{%- endmacro -%}"
    ) + template


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    source_max_len: int,
    target_max_len: int,
    truncation: Truncation,
    *,
    now: datetime | None = None,
) -> Example:
    """Token ids and target mask of one conversation, cut to the limits, counted in `truncation`.

    The ids are those of the whole conversation tokenised at once, up to the last target. A token is
    a target if any character of it is. The source is what comes before the first target; it loses
    its beginning, because its end leads into the answer. The rest counts as the target; it loses
    its end. There is always a target with something before it to predict it from.
    """
    try:
        ids, is_target = _tokens(conversation.turns, tokenizer, now)
        # The first token of all is never predicted.
        split = next((i for i, target in enumerate(is_target) if target and i), None)
        if split is None:
            raise ValueError("its answer has no token that others lead into")
    except ValueError as error:
        raise UserError(f"{conversation.origin}: {error}") from None
    begin, end = max(0, split - source_max_len), min(len(ids), split + target_max_len)
    if begin:
        truncation.sources += 1
        truncation.source_tokens += begin
    if end < len(ids):
        truncation.targets += 1
        truncation.target_tokens += len(ids) - end
    return Example(tuple(ids[begin:end]), tuple(is_target[begin:end]))


def _tokens(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, now: datetime | None
) -> tuple[list[int], list[bool]]:
    """The conversation's ids up to its last target, and which of them are targets."""
    if tokenizer.chat_template is None:
        segments = _render_plain(turns, tokenizer, ask=False)
        text = "".join(segment for segment, _ in segments)
        ends = list(accumulate(len(segment) for segment, _ in segments))
        of_targets = [target for _, target in segments]
        spans = [s for s, target in zip(pairwise([0, *ends]), of_targets, strict=True) if target]
    else:
        text, spans = _render_template(turns, tokenizer, ask=False, now=now)
    first = _first_tokens(tokenizer, text)
    if tokenizer.is_fast:
        ids, is_target = _masked_by_offsets(tokenizer, text, spans)
    else:
        ids, is_target = _masked_by_prefixes(tokenizer, text, spans)
    last = max((i for i, target in enumerate(is_target) if target), default=-1)
    return first + ids[: last + 1], [False] * len(first) + is_target[: last + 1]


def _masked_by_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_target = []
    before = 0
    for start, end in encoded["offset_mapping"]:
        if start == end:
            # Byte-level tokenizers leave white space out of a token's place, all of it in this one.
            start = before
        is_target.append(any(start < to and end > begin for begin, to in spans))
        before = end
    return list(encoded["input_ids"]), is_target


def _masked_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """For tokenizers that do not tell the place of a token: by the tokens of the text before it."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    is_target = [False] * len(ids)
    for start, end in spans:
        first, _ = _agreeing(tokenizer, text[:start], ids)
        last, whole = _agreeing(tokenizer, text[:end], ids)
        if not whole:
            # A token goes on after the target: all up to it are needed to write the target.
            length = len(
                tokenizer.decode(tokenizer(text[:end], add_special_tokens=False).input_ids)
            )
            while last < len(ids) and len(tokenizer.decode(ids[:last])) < length:
                last += 1
        is_target[first:last] = [True] * (last - first)
    return ids, is_target


def _agreeing(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> tuple[int, bool]:
    """How many tokens of `text` `ids` begins with, and whether these are all of them."""
    own = tokenizer(text, add_special_tokens=False).input_ids if text else []
    count = _agreement(own, ids)
    return count, count == len(own)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """A text as consecutive sequences of `length` tokens, all of them targets."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    chunks = [tuple(ids[i : i + length]) for i in range(0, len(ids), length)]
    # One token predicts nothing.
    return [Example(chunk, (True,) * len(chunk)) for chunk in chunks if len(chunk) > 1]


def encode_prompt(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, now: datetime | None = None
) -> torch.Tensor:
    """Token ids [1, length] that ask the model for the next answer."""
    try:
        text = "".join(segment for segment, _ in render(turns, tokenizer, ask=True, now=now))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor([_first_tokens(tokenizer, text) + ids])
    except ValueError as error:
        raise UserError(f"the prompt: {error}") from None


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the tokenizer puts before a text; nothing where a chat template writes that itself."""
    if tokenizer.chat_template is not None:
        return []
    with_them = list(tokenizer(text).input_ids)
    without = list(tokenizer(text, add_special_tokens=False).input_ids)
    for count in range(len(with_them) - len(without) + 1):
        if with_them[count : count + len(without)] == without:
            return with_them[:count]
    raise ValueError("the tokenizer changes a text when it adds its special tokens")


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
