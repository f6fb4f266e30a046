"""The data of a run: the demo's or the user's, split and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import torch
from transformers import PreTrainedTokenizerBase

from . import UserError
from .config import Config
from .data import Conversation, Turn, detect_format, read_conversations, read_text, split_held_out
from .sequences import Example, Truncation, encode, encode_prompt, encode_text
from .topics import topic_conversations

_TEXT_PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Dataset:
    train: list[Example]
    held_out: list[Example]
    prompt: torch.Tensor  # token ids [1, length], what the model is asked before and after
    truncation: Truncation

    def digest(self) -> str:
        """A hash of every token and mask, so that a resumed run can tell that they are the same."""
        sha = hashlib.sha256()
        for examples in (self.train, self.held_out):
            for example in examples:
                sha.update(repr((example.input_ids, example.is_target)).encode())
            sha.update(b"end")
        return sha.hexdigest()

    def check_ids(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Raise `UserError` for a token that an embedding table of `rows` does not have."""
        prompt = tuple(self.prompt[0].tolist())
        for ids in (prompt, *(e.input_ids for e in (*self.train, *self.held_out))):
            if (largest := max(ids)) >= rows:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise UserError(
                    f"the data has the token {token!r}, number {largest}, and the model's table "
                    f"has {rows} rows: its tokenizer has tokens that the model does not know"
                )


def load_dataset(
    config: Config, tokenizer: PreTrainedTokenizerBase, now: datetime | None = None
) -> Dataset:
    """Read, split and encode; `now` is what chat templates write as the date.

    Raises `UserError` naming the file and line of what is malformed.
    """
    if config.data is None:
        if config.eval_data is not None:
            raise UserError("--eval-data goes with --data")
        dataset = _from_conversations(*topic_conversations(), config, tokenizer, now)
    else:
        data_format = config.data_format
        if data_format == "auto":
            data_format = detect_format(config.data)
        if data_format == "text":
            dataset = _from_text(config, tokenizer)
        else:
            train = read_conversations(config.data, data_format)
            if config.eval_data is None:
                train, held_out = split_held_out(train, config.held_out_fraction)
            else:
                held_out = read_conversations(config.eval_data, data_format)
            dataset = _from_conversations(train, held_out, config, tokenizer, now)
    if config.sample_prompt is None:
        return dataset
    prompt = encode_prompt([Turn("user", config.sample_prompt)], tokenizer, now=now)
    return Dataset(dataset.train, dataset.held_out, prompt, dataset.truncation)


def _from_conversations(
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    now: datetime | None,
) -> Dataset:
    truncation = Truncation()
    held_out = held_out[: config.max_held_out]
    lengths = (config.source_max_len, config.target_max_len)
    train_examples, held_out_examples = (
        [encode(c, tokenizer, *lengths, truncation, now=now) for c in conversations]
        for conversations in (train, held_out)
    )
    if turns := held_out[0].prompt():
        prompt = encode_prompt(turns, tokenizer, now=now)
    else:
        # The assistant speaks first: what a template writes before it, at least a token.
        first = held_out_examples[0]
        prompt = torch.tensor([first.input_ids[: max(1, first.is_target.index(True))]])
    return Dataset(train_examples, held_out_examples, prompt, truncation)


def _from_text(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    assert config.data is not None
    length = config.source_max_len + config.target_max_len
    train = encode_text(read_text(config.data), tokenizer, length)
    if config.eval_data is not None:
        held_out = encode_text(read_text(config.eval_data), tokenizer, length)
    else:
        # The end of the text rather than places all over it, whose neighbours would be trained on.
        count = max(1, round(config.held_out_fraction * len(train)))
        train, held_out = train[:-count], train[-count:]
    if not train or not held_out:
        raise UserError(
            f"{config.data}: too short: one sequence of {length} tokens cannot be split into "
            "training and held-out data; give more text or lower --target-max-len"
        )
    first = held_out[0].input_ids
    prompt = torch.tensor([first[: min(_TEXT_PROMPT_TOKENS, len(first) // 2)]])
    return Dataset(train, held_out[: config.max_held_out], prompt, Truncation())
