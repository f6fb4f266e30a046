"""Data files to conversations, whose turns say whether the loss covers them.

A malformed record raises `UserError` naming the file and the line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import UserError, prose
from .strict_json import loads

_NAMED_LINES = 10  # malformed ones, in a message


@dataclass(frozen=True)
class Turn:
    role: str  # "system", "user" or "assistant"
    text: str
    is_target: bool = False


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    origin: str  # where it came from, for messages: "file:line" or a topic

    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the first target."""
        first = next(i for i, turn in enumerate(self.turns) if turn.is_target)
        return self.turns[:first]


class _MalformedError(Exception):
    """What is wrong with a record; the reader adds where it is."""


def _missing(record: dict[str, Any], field: str) -> _MalformedError:
    return _MalformedError(f'the field "{field}" is missing; the record has {sorted(record)}')


def _text(record: dict[str, Any], field: str, *, required: bool = True) -> str:
    if field not in record:
        if required:
            raise _missing(record, field)
        return ""
    value = record[field]
    if not isinstance(value, str):
        raise _MalformedError(f'the field "{field}" is {_json_type(value)}; takes a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _MalformedError(f'the field "{field}" holds half a surrogate pair: {error}') from None
    return value


def _target(text: str, field: str) -> str:
    if not text.strip():
        raise _empty(field)
    return text


def _empty(field: str) -> _MalformedError:
    return _MalformedError(f'the target in "{field}" is empty')


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _alpaca(record: dict[str, Any]) -> tuple[Turn, ...]:
    prompt = _text(record, "instruction").strip()
    # Public copies of Alpaca's data say null where there is none.
    given = {name: value for name, value in record.items() if (name, value) != ("input", None)}
    if extra := _text(given, "input", required=False).strip():
        prompt = f"{prompt}\n\n{extra}"
    answer = _target(_text(record, "output"), "output")
    return (Turn("user", prompt), Turn("assistant", answer, is_target=True))


def _self_instruct(record: dict[str, Any]) -> tuple[Turn, ...]:
    answer = _target(_text(record, "completion"), "completion")
    return (Turn("user", _text(record, "prompt").strip()), Turn("assistant", answer.strip(), True))


def _transcript(text: str, marker: re.Pattern[str], field: str) -> list[Turn]:
    """Turns of a text that marks each with its speaker; `marker`'s group 1 is the speaker."""
    matches = list(marker.finditer(text))
    if not matches or text[: matches[0].start()].strip():
        raise _MalformedError(f'"{field}" does not begin with a speaker ({marker.pattern})')
    ends = [match.start() for match in matches[1:]] + [len(text)]
    turns = []
    for match, end in zip(matches, ends, strict=True):
        assistant = match.group(1).lower() in ("assistant", "bot")
        said = text[match.end() : end].strip()
        # An empty answer between others is context: it is not to be learnt.
        turns.append(Turn("assistant" if assistant else "user", said, assistant and bool(said)))
    empty = any(turn.role == "assistant" for turn in turns)
    while turns and not turns[-1].is_target:
        # The prompt of an answer that is not there: nothing to learn from it.
        turns.pop()
    if not turns:
        raise _empty(field) if empty else _MalformedError(f'"{field}" has no answer')
    return turns


_HH_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_OASST_SPEAKER = re.compile(r"### (Human|Assistant):")
_CHIP2_SPEAKER = re.compile(r"<(human|bot)>:")


def _hh_rlhf(record: dict[str, Any]) -> tuple[Turn, ...]:
    turns = _transcript(_text(record, "chosen"), _HH_SPEAKER, "chosen")
    # Only the last answer was chosen over another; the earlier ones are context.
    return (*(Turn(turn.role, turn.text) for turn in turns[:-1]), turns[-1])


def _oasst1(record: dict[str, Any]) -> tuple[Turn, ...]:
    return tuple(_transcript(_text(record, "text"), _OASST_SPEAKER, "text"))


def _chip2(record: dict[str, Any]) -> tuple[Turn, ...]:
    return tuple(_transcript(_text(record, "text"), _CHIP2_SPEAKER, "text"))


_ROLES = ("system", "user", "assistant")


def _chat(record: dict[str, Any]) -> tuple[Turn, ...]:
    if "messages" not in record:
        raise _missing(record, "messages")
    messages = record["messages"]
    if not isinstance(messages, list):
        raise _MalformedError(f'the field "messages" is {_json_type(messages)}; takes a list')
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _MalformedError(f"messages[{i}] is {_json_type(message)}; takes an object")
        try:
            role, content = _text(message, "role"), _text(message, "content")
        except _MalformedError as error:
            raise _MalformedError(f"messages[{i}]: {error}") from None
        if role not in _ROLES:
            raise _MalformedError(f'messages[{i}]: the role is "{role}"; takes one of {_ROLES}')
        if role == "assistant":
            _target(content, f"messages[{i}]")
        turns.append(Turn(role, content, is_target=role == "assistant"))
    while turns and not turns[-1].is_target:
        turns.pop()
    if not turns:
        raise _MalformedError('"messages" has no turn of the assistant')
    return tuple(turns)


@dataclass(frozen=True)
class _Format:
    read: Callable[[dict[str, Any]], tuple[Turn, ...]]
    recognise: Callable[[dict[str, Any]], bool]


def _text_has(pattern: re.Pattern[str]) -> Callable[[dict[str, Any]], bool]:
    return lambda r: isinstance(r.get("text"), str) and pattern.search(r["text"]) is not None


RECORD_FORMATS = {
    "chat": _Format(_chat, lambda r: "messages" in r),
    "alpaca": _Format(_alpaca, lambda r: {"instruction", "output"} <= r.keys()),
    "self-instruct": _Format(_self_instruct, lambda r: {"prompt", "completion"} <= r.keys()),
    "hh-rlhf": _Format(_hh_rlhf, lambda r: "chosen" in r),
    "oasst1": _Format(_oasst1, _text_has(_OASST_SPEAKER)),
    "chip2": _Format(_chip2, _text_has(_CHIP2_SPEAKER)),
}
DATA_FORMATS = ("auto", *RECORD_FORMATS, "text")


def detect_format(path: Path) -> str:
    """The format of a data file, from its first non-blank line.

    JSON Lines are told from plain text by that line being a JSON object. Raises `UserError` where
    it is one of no known form, or where a file that is named as JSON does not begin with one.
    """
    for line_number, line in _lines(path):
        if path.suffix.lower() not in prose.JSON_NAMES and not prose.begins_as_json(line):
            return "text"
        record = _parse(path, line_number, line)
        for name, data_format in RECORD_FORMATS.items():
            if data_format.recognise(record):
                return name
        hint = f"--data-format names one of {', '.join(RECORD_FORMATS)}"
        if isinstance(record.get("text"), str):
            hint = f'for its "text" alone, make a text of it: {prose.TEXT_OF_JSON_LINES}'
        raise UserError(
            f"{path}:{line_number}: none of the known forms has the fields {sorted(record)}; {hint}"
        )
    raise UserError(f"{path}: the file is empty")


def read_conversations(path: Path, data_format: str) -> list[Conversation]:
    """All records of a JSON Lines file. Raises `UserError` naming the lines that are malformed.

    A line that is no JSON object ends the reading; what is wrong with records is told together.
    """
    conversations: list[Conversation] = []
    malformed: list[str] = []
    for line_number, line in _lines(path):
        record = _parse(path, line_number, line)
        try:
            turns = RECORD_FORMATS[data_format].read(record)
        except _MalformedError as error:
            malformed.append(f":{line_number}: {error} (read as {data_format})")
        else:
            conversations.append(Conversation(turns, f"{path}:{line_number}"))
    if malformed:
        more = len(malformed) - _NAMED_LINES
        named = "; ".join(malformed[:_NAMED_LINES])
        raise UserError(f"{path}{named}{f'; and {more} more lines' if more > 0 else ''}")
    if not conversations:
        raise UserError(f"{path}: the file is empty")
    return conversations


def read_text(path: Path) -> str:
    """The whole of a UTF-8 text file. Raises `UserError` where it is blank or not prose."""
    named = prose.refused_name(path)
    try:
        text = "\n".join(line for _, line in _lines(path, skip_blank=False))
    except UserError:
        if named and path.is_file():
            raise UserError(f"{path}: {named}") from None
        raise
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    if reason := named or prose.refused_content(text):
        raise UserError(f"{path}: {reason}")
    return text


def _lines(path: Path, *, skip_blank: bool = True) -> Iterator[tuple[int, str]]:
    if path.is_fifo():
        raise UserError(f"{path}: got a pipe; takes a file, for it is read more than once")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        for line_number, raw in enumerate(file, start=1):
            if line_number == 1 and (reason := prose.refused_bytes(raw)):
                raise UserError(f"{path}:1: {reason}")
            try:
                line = raw.decode("utf-8-sig" if line_number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{line_number}: not UTF-8: {error.reason} at byte {error.start + 1}"
                ) from None
            if line.strip() or not skip_blank:
                yield line_number, line


def _parse(path: Path, line_number: int, line: str) -> dict[str, Any]:
    try:
        record = loads(line)
    except ValueError as error:
        hint = ""
        if line_number == 1 and line.lstrip().startswith("["):
            hint = " (a JSON array? JSON Lines has one object a line: jq -c '.[]' makes them)"
        elif line.strip() == "{":
            hint = " (one object over many lines? JSON Lines has one a line: jq -c . makes them)"
        raise UserError(f"{path}:{line_number}: not JSON: {error}{hint}") from None
    if isinstance(record, list) and line_number == 1:
        raise UserError(
            f"{path}:1: a list; takes one object a line (jq -c '.[]' makes them of an array)"
        )
    if not isinstance(record, dict):
        raise UserError(f"{path}:{line_number}: {_json_type(record)}; takes one object a line")
    return record


def split_held_out(
    conversations: Sequence[Conversation], fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out), about `fraction` of the distinct conversations being held out.

    A hash of the content decides, so that the split depends neither on the order nor on a seed, and
    copies of one conversation never lie on both sides. Raises `UserError` where one side is empty.
    """

    def key(conversation: Conversation) -> str:
        turns = [(turn.role, turn.text) for turn in conversation.turns]
        return hashlib.sha256(json.dumps(turns).encode()).hexdigest()

    keys = [key(conversation) for conversation in conversations]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise UserError(
            f"{conversations[0].origin}: one distinct record cannot be split into training and "
            "held-out data; give at least two"
        )
    held_out_keys = set(distinct[: min(max(1, round(fraction * len(distinct))), len(distinct) - 1)])
    train = [c for c, k in zip(conversations, keys, strict=True) if k not in held_out_keys]
    held_out = [c for c, k in zip(conversations, keys, strict=True) if k in held_out_keys]
    return train, held_out
