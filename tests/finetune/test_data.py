"""Data forms, malformed lines, the split, tokens and masks, and batches of examples/finetune.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import UserError, topics
from finetuning.data import (
    DATA_FORMATS,
    Conversation,
    Turn,
    detect_format,
    read_conversations,
    read_text,
    split_held_out,
)
from finetuning.sequences import (
    IGNORE,
    Example,
    Truncation,
    collate,
    encode,
    encode_prompt,
    encode_text,
    epoch_batches,
    render,
)
from finetuning.topics import HELD_OUT_TOPICS, topic_conversations
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

U, A = "user", "assistant"

# form -> (record, the turns it gives as (role, text, is_target))
RECORDS: dict[str, tuple[dict[str, Any], list[tuple[str, str, bool]]]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "ignored"},
        [(U, "Add.\n\n1 2", False), (A, "3", True)],
    ),
    "self-instruct": (
        {"prompt": "Add 1 2\n", "completion": " 3"},
        [(U, "Add 1 2", False), (A, "3", True)],
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "x"},
        [(U, "a", False), (A, "b", False), (U, "c", False), (A, "d", True)],
    ),
    "oasst1": (
        {"text": "### Human: a\nb### Assistant: c### Human: d### Assistant: e"},
        [(U, "a\nb", False), (A, "c", True), (U, "d", False), (A, "e", True)],
    ),
    "chip2": (
        {"text": "<human>: a\n<bot>: b", "metadata": {}},
        [(U, "a", False), (A, "b", True)],
    ),
    "chat": (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "never answered"},
            ]
        },
        [("system", "s", False), (U, "a", False), (A, "b", True)],
    ),
}


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        """A file of these lines: bytes as they are, anything else as JSON."""
        path = tmp_path / "data.jsonl"
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(encoded) + b"\n")
        return path

    return write


@pytest.mark.parametrize("data_format", RECORDS)
def test_a_form_is_detected_and_read(data_format: str, jsonl: Callable[..., Path]) -> None:
    record, turns = RECORDS[data_format]
    path = jsonl(b"", record, b"  ", record)
    assert detect_format(path) == data_format
    first, second = read_conversations(path, data_format)
    assert [(t.role, t.text, t.is_target) for t in first.turns] == turns
    assert (first.origin, second.origin) == (f"{path}:2", f"{path}:4")


def test_an_override_wins_over_detection(jsonl: Callable[..., Path]) -> None:
    both = {"prompt": "p", "completion": "c", "chosen": "\n\nHuman: h\n\nAssistant: a"}
    path = jsonl(both)
    assert detect_format(path) == "self-instruct"
    assert read_conversations(path, "hh-rlhf")[0].turns[0].text == "h"


def test_plain_text_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffOnce upon\r\n\r\na time".encode())
    assert detect_format(path) == "text"
    assert read_text(path) == "Once upon\n\na time"


GOOD = {"instruction": "i", "output": "o"}
MALFORMED = {
    "not-json": ("alpaca", b'{"instruction": "i", ', "not JSON: "),
    "nesting": ("alpaca", b"[" * 100_000, "not JSON: "),
    "not-an-object": ("alpaca", b"[1]", "a list; takes one object a line"),
    "not-utf8": ("alpaca", b'{"instruction": "\xff"}', "not UTF-8: invalid start byte at byte 18"),
    "half-a-pair": (
        "alpaca",
        b'{"instruction": "\\ud800", "output": "o"}',
        '"instruction" holds half a surrogate pair',
    ),
    "missing-field": ("alpaca", {"instruction": "i"}, '"output" is missing'),
    "wrong-type": ("alpaca", {**GOOD, "output": 3}, '"output" is a number; takes a string'),
    "null": ("alpaca", {**GOOD, "output": None}, '"output" is null'),
    "empty-target": ("alpaca", {**GOOD, "output": " \n"}, 'the target in "output" is empty'),
    "empty-completion": ("self-instruct", {"prompt": "p", "completion": ""}, "is empty"),
    "no-speaker": ("oasst1", {"text": "hello"}, "does not begin with a speaker"),
    "text-before-speaker": ("oasst1", {"text": "hello ### Human: a"}, "does not begin with"),
    "no-answer": ("oasst1", {"text": "### Human: a"}, '"text" has no answer'),
    "empty-answer": ("chip2", {"text": "<human>: a\n<bot>: "}, "is empty"),
    "hh-no-answer": ("hh-rlhf", {"chosen": "\n\nHuman: a"}, '"chosen" has no answer'),
    "messages-missing": ("chat", GOOD, '"messages" is missing'),
    "messages-string": ("chat", {"messages": "a"}, '"messages" is a string; takes a list'),
    "message-string": ("chat", {"messages": ["a"]}, "messages[0] is a string"),
    "message-field": ("chat", {"messages": [{"role": "user"}]}, 'messages[0]: the field "content"'),
    "role": ("chat", {"messages": [{"role": "bot", "content": "a"}]}, 'the role is "bot"'),
    "no-assistant": ("chat", {"messages": [{"role": "user", "content": "a"}]}, "no turn of the"),
    "empty-message": ("chat", {"messages": [{"role": "assistant", "content": ""}]}, "is empty"),
}


@pytest.mark.parametrize(("data_format", "line", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_named(
    data_format: str, line: Any, message: str, jsonl: Callable[..., Path]
) -> None:
    path = jsonl(RECORDS[data_format][0], RECORDS[data_format][0], line)
    with pytest.raises(UserError) as error:
        read_conversations(path, data_format)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_all_malformed_records_are_named(jsonl: Callable[..., Path]) -> None:
    bad = {**GOOD, "output": " "}
    path = jsonl(GOOD, bad, GOOD, bad, {"instruction": "i"})
    with pytest.raises(UserError) as error:
        read_conversations(path, "alpaca")
    message = str(error.value)
    assert message.startswith(f'{path}:2: the target in "output" is empty (read as alpaca); :4: ')
    assert ':5: the field "output" is missing' in message
    with pytest.raises(UserError, match=r":10: [^;]+; and 3 more lines$"):
        read_conversations(jsonl(*[bad] * 13), "alpaca")


def test_no_input_may_be_null(jsonl: Callable[..., Path]) -> None:
    (conversation,) = read_conversations(jsonl({**GOOD, "input": None}), "alpaca")
    assert conversation.turns[0].text == "i"
    with pytest.raises(UserError, match='"input" is a number'):
        read_conversations(jsonl({**GOOD, "input": 0}), "alpaca")


def test_an_empty_answer_is_no_target(jsonl: Callable[..., Path]) -> None:
    h, a = "\n\nHuman:", "\n\nAssistant:"
    path = jsonl(
        {"chosen": f"{h} hi{a}{h} hello?{a} yes"},
        {"chosen": f"{h} hi{a} yes{h} and?{a}"},
    )
    between, last = read_conversations(path, "hh-rlhf")
    assert [(t.role, t.text, t.is_target) for t in between.turns] == [
        *((U, "hi", False), (A, "", False)),
        *((U, "hello?", False), (A, "yes", True)),
    ]
    assert [(t.role, t.text, t.is_target) for t in last.turns] == [
        *((U, "hi", False), (A, "yes", True)),
    ]
    (both,) = read_conversations(
        jsonl({"text": "### Human: a### Assistant: b### Human: c### Assistant:"}), "oasst1"
    )
    assert [(t.text, t.is_target) for t in both.turns] == [("a", False), ("b", True)]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"instruction": "a", "instruction": "b", "output": "o"}', "instruction"),
        ('{"instruction": "a", "output": "o", "output": "p"}', "output"),
        ('{"messages": [{"role": "user", "role": "assistant", "content": "c"}]}', "role"),
        ('{"instruction": "a", "output": "o", "extra": {"x": 1, "x": 2}}', "x"),
    ],
)
def test_a_key_given_twice_is_refused(line: str, key: str, jsonl: Callable[..., Path]) -> None:
    path = jsonl(GOOD, line.encode())
    with pytest.raises(UserError, match=f':2: not JSON: the key "{key}" is given twice'):
        read_conversations(path, "alpaca")
    with pytest.raises(UserError, match=f':1: not JSON: the key "{key}" is given twice'):
        detect_format(jsonl(line.encode()))


PROSE = {
    "prose": "Once upon a time, there was a kernel.\n\nIt was fast, and small.\n",
    "one quoted line": '"Come in," she said, and "sit down."\n',
    "quoted lines": '"Come in."\nHe did not.\n"Sit down."\n',
    "commas": "All work, and no play\nmakes Jack, a dull boy\nso they say, at least\n" * 5,
    "code": "{ int x; }\n[[nodiscard]] int f();\n",
    "attribute": "[[nodiscard]] int f();\n",
    "wiki": "[[1984]] is a novel by [[George Orwell]].\n",
    "readme": '<div align="center">\n\n# Name\n\n</div>\n\nWhat it is: a library, for kernels.\n',
    "set": "{a, b} is a set\n",
    "song": "[Chorus]\nla la la\n",
    "markdown": "# Title\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n<p>one</p>\n",
    "rest": "Title\n=====\n\n.. code::\n\n   x = {'a': 1}\n",
    "colours": "\x1b[31mred\x1b[0m text, from a terminal\x0c",
    "one line of commas": "a,b,c\n",
    "words": "alpha\nbeta\ngamma\n",
    "less than": "a < b and b > c\n",
    "long line": "Yes,but\n" + "x" * 200_000 + "\n",
}


@pytest.mark.parametrize("text", PROSE.values(), ids=PROSE)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "A.TXT"])
def test_prose_is_read(text: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert detect_format(path) == "text"
    assert read_text(path) == text.removesuffix("\n")


NOT_PROSE: dict[str, tuple[str | bytes, str]] = {
    "json lines": ('{"text": "a"}\n{"text": "b"}\n', "JSON, not prose"),
    "broken json lines": ('{"text": "a"}\n{"text": "b\n', "JSON, not prose"),
    "array": ('[\n {"instruction": "q"}\n]\n', "JSON, not prose"),
    "array of strings": ('["one",\n "two"]\n', "JSON, not prose"),
    "object over lines": ('\n{\n "a": 1\n}\n', "JSON, not prose"),
    "cut object": ('{"a": {"b": [1, 2', "JSON, not prose"),
    "lines of strings": ('"just a string"\n"another"\n', "JSON, not prose"),
    "csv": ("id,text\n1,hello\n2,there\n", "a table, not prose"),
    "csv with a long cell": ("id,text\n1," + "x" * 200_000 + "\n2,y\n", "a table, not prose"),
    "quoted csv": ('"id","text"\n1,"hello, you"\n2,there\n', "a table, not prose"),
    "tsv": ("id\ttext\n1\thello, you\n", "a table, not prose"),
    "semicolons": ("id;text\n1;hello\n", "a table, not prose"),
    "html": ("<!DOCTYPE html>\n<html><p>x</p></html>", "markup, not prose"),
    "xml": ('<?xml version="1.0"?>\n<a/>', "markup, not prose"),
    "html fragment": ("  <div class='x'>text <i>of</i> <b>it</b></div>", "markup, not prose"),
    "nul": ("text\nmore\x00text", "binary, not prose: the control character '\\\\x00' in line 2"),
    "utf-16": ("text\n".encode("utf-16"), "not UTF-8 but UTF-16: iconv"),
    "latin-1": ("caf\u00e9\n".encode("latin-1"), "not UTF-8"),
    "parquet": (b"PAR1\x15\x04\x15", "not text but Parquet"),
    "pdf": (b"%PDF-1.7\n", "not text but PDF"),
    "zip": (b"PK\x03\x04\x14", "not text but a ZIP archive"),
    "gzip": (b"\x1f\x8b\x08", "not text but gzip"),
    "rtf": (b"{\\rtf1 hello}", "not text but RTF"),
}


@pytest.mark.parametrize(("content", "message"), NOT_PROSE.values(), ids=NOT_PROSE)
def test_what_is_no_prose_by_content_is_refused(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as error:
        read_text(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(UserError):
        _read_as_detected(path)


def _read_as_detected(path: Path) -> object:
    data_format = detect_format(path)
    return read_text(path) if data_format == "text" else read_conversations(path, data_format)


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.JSON", "a.csv", "a.parquet", "a.html", "a.pdf", "a.gz", "a.pt"]
)
@pytest.mark.parametrize("content", [b"some prose\n", b"\xff\xfebytes"])
def test_what_is_no_prose_by_name_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"prose|text|archive"):
        read_text(path)


def test_a_pipe_is_not_read_in_parts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (detect_format, read_text, lambda path: read_conversations(path, "alpaca")):
        with pytest.raises(UserError, match="got a pipe; takes a file"):
            read(tmp_path / "pipe")


FORMS_OF_OTHERS = {
    "text field": ({"text": "Just text."}, "jq -r .text"),
    "dolly": ({"instruction": "Add", "context": "", "response": "0"}, "none of the known forms"),
    "question": ({"question": "Add", "answer": "0"}, "none of the known forms"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}]}, "none of the known forms"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        r'messages\[0\]: the field "content" is a list; takes a string',
    ),
    "tool": (
        {"messages": [{"role": "tool", "content": "x"}]},
        r'messages\[0\]: the role is "tool"',
    ),
    "tool calls": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        r'messages\[0\]: the field "content" is null',
    ),
    "lists": (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant"}]},
        '"completion" is a list; takes a string',
    ),
}


@pytest.mark.parametrize(("record", "message"), FORMS_OF_OTHERS.values(), ids=FORMS_OF_OTHERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_forms_of_others_are_refused(
    record: dict[str, Any], message: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        _read_as_detected(path)


def test_no_suggested_format_trains_on_json(tmp_path: Path) -> None:
    """Whatever a message proposes: the text of JSON Lines is never read with its syntax."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "Just text."}\n' * 9)
    with pytest.raises(UserError) as error:
        detect_format(path)
    assert "--data-format" not in str(error.value)
    with pytest.raises(UserError, match="JSON, not prose"):
        read_text(path)
    for data_format in DATA_FORMATS[1:-1]:
        with pytest.raises(UserError):
            read_conversations(path, data_format)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.JSONL"])
def test_a_file_named_as_json_is_no_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('"just a string"\n"another"\n')
    with pytest.raises(UserError, match=":1: a string; takes one object a line"):
        detect_format(path)
    path.write_text("plain text\n")
    with pytest.raises(UserError, match=":1: not JSON"):
        detect_format(path)


def test_an_array_gets_advice(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"jq -c '\.\[\]' makes them"):
        detect_format(jsonl([GOOD, GOOD]))
    with pytest.raises(UserError, match=r"jq -c \. makes them"):
        detect_format(jsonl(b"{", b' "instruction": "q"', b"}"))


def test_what_cannot_be_detected_is_an_error(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r":1: none of the known forms has the fields \['a'\]"):
        detect_format(jsonl({"a": 1}))
    with pytest.raises(UserError, match=":2: not JSON"):
        detect_format(jsonl(b"", b"plain text in a .jsonl file"))
    with pytest.raises(UserError, match="JSON Lines has one object a line"):
        detect_format(jsonl(b"[", b'{"instruction": 1}', b"]"))
    with pytest.raises(UserError, match="the file is empty"):
        detect_format(jsonl(b"", b" "))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        detect_format(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        detect_format(tmp_path)
    with pytest.raises(UserError, match="the file is empty"):
        read_text(jsonl(b" ", b""))


def _conversations(texts: list[str]) -> list[Conversation]:
    return [
        Conversation((Turn(U, text), Turn(A, text, is_target=True)), f"file:{i}")
        for i, text in enumerate(texts, start=1)
    ]


def test_the_split_depends_on_content_only() -> None:
    texts = [f"text {i}" for i in range(40)]
    train, held_out = split_held_out(_conversations(texts), 0.1)
    assert len(held_out) == 4
    assert len(train) == 36
    shuffled = texts[::-1] + texts[:7]  # with copies
    train_again, held_out_again = split_held_out(_conversations(shuffled), 0.1)
    assert {c.turns for c in held_out_again} == {c.turns for c in held_out}
    assert not {c.turns for c in train_again} & {c.turns for c in held_out_again}
    assert len(train_again) + len(held_out_again) == 47


def test_the_split_leaves_neither_side_empty() -> None:
    train, held_out = split_held_out(_conversations(["a", "b"]), 0.0)
    assert (len(train), len(held_out)) == (1, 1)
    train, held_out = split_held_out(_conversations(["a", "b"]), 0.999)
    assert (len(train), len(held_out)) == (1, 1)
    with pytest.raises(UserError, match="file:1: one distinct record"):
        split_held_out(_conversations(["a", "a"]), 0.5)


def test_held_out_topics_are_not_trained_on() -> None:
    train, held_out = topic_conversations()
    assert topic_conversations() == (train, held_out)
    assert {c.origin for c in held_out} == {f"topic {topic}" for topic in HELD_OUT_TOPICS}
    assert len(train) > 300
    trained = " ".join(" ".join(turn.text for turn in c.turns) for c in train)
    trained = " ".join(trained.split())
    for conversation in held_out:
        for paragraph in conversation.turns[-1].text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= 60:
                assert words not in trained


def test_pieces_of_the_documentation_keep_to_their_limit() -> None:
    limit = topics._CHUNK_CHARS
    line = "x" * (limit // 2)
    rest = limit - len(line) - 1
    # Lines fill a piece up to the limit, line ends included, and not beyond.
    assert topics._pieces(f"{line}\n{'y' * rest}") == [f"{line}\n{'y' * rest}"]
    assert topics._pieces(f"{line}\n{'y' * (rest + 1)}") == [line, "y" * (rest + 1)]
    assert topics._pieces(f"{'z' * (limit + 1)}\na\nb") == ["z" * (limit + 1), "a\nb"]
    # Paragraphs fill a chunk likewise, with a blank line between them.
    fits = ["p" * 300, "q" * (limit - 302)]
    assert topics._chunks(fits) == ["\n\n".join(fits)]
    assert topics._chunks([fits[0], fits[1] + "q"]) == [fits[0], fits[1] + "q"]
    long = ["\n".join(["w" * 99] * 8), "v"]
    assert topics._chunks(long) == ["\n".join(["w" * 99] * 7), "w" * 99 + "\n\nv"]
    train, held_out = topic_conversations()
    for conversation in train + held_out:
        text = conversation.turns[-1].text
        assert len(text) <= limit or "\n" not in text
        assert len(conversation.turns[0].text) < topics._CONTEXT_CHARS + 150


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _encode(
    tokenizer: PreTrainedTokenizerFast, turns: tuple[Turn, ...], source: int = 99, target: int = 99
) -> tuple[Example, Truncation]:
    truncation = Truncation()
    conversation = Conversation(turns, "data.jsonl:7")
    return encode(conversation, tokenizer, source, target, truncation), truncation


def test_targets_are_the_answers_and_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Turn(U, "one"), Turn(A, "two", True), Turn(U, "three"), Turn(A, "four", True))
    example, truncation = _encode(tokenizer, turns)
    parts = [("u:one<end>\na:", False), ("two<end>", True)]
    parts += [("\nu:three<end>\na:", False), ("four<end>", True)]
    assert render(turns, tokenizer) == parts
    assert example.input_ids == _tokens(tokenizer, "".join(text for text, _ in parts))
    expected = [t for text, t in parts for _ in _tokens(tokenizer, text)]
    assert list(example.is_target) == expected
    assert truncation == Truncation()


def test_an_answer_without_loss_is_context(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Turn(U, "one"), Turn(A, "two"), Turn(U, "three"), Turn(A, "four", True))
    example, _ = _encode(tokenizer, turns)
    assert sum(example.is_target) == len(_tokens(tokenizer, "four<end>"))


def test_a_prompt_is_tokenised_as_in_training(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Turn(U, "one"), Turn(A, "two", True))
    example, _ = _encode(tokenizer, turns)
    prompt = tuple(encode_prompt(turns[:1], tokenizer)[0].tolist())
    assert prompt == example.input_ids[: len(prompt)]
    assert example.is_target[len(prompt) - 1 : len(prompt) + 1] == (False, True)


def test_truncation_keeps_the_end_of_the_source_and_is_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turns = (Turn(U, "question"), Turn(A, "answer", True))
    example, truncation = _encode(tokenizer, turns, source=5, target=4)
    assert tokenizer.decode(list(example.input_ids)) == "n<end>\na:answ"
    assert sum(example.is_target) == 4
    source, target = _tokens(tokenizer, "u:question<end>\na:"), _tokens(tokenizer, "answer<end>")
    assert truncation == Truncation(1, len(source) - 5, 1, len(target) - 4)


def test_without_a_chat_template_the_plain_form_is_used() -> None:
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<end>": 0}, [])), eos_token="<end>"
    )
    turns = (Turn("system", "s"), Turn(U, "one"), Turn(A, "two", True), Turn(U, "three"))
    assert render(turns, plain, ask=True) == [
        ("s\n", False),
        ("### Human: one\n", False),
        ("### Assistant:", False),
        (" two<end>", True),
        ("### Human: three\n", False),
        ("### Assistant:", False),
    ]


def test_a_template_that_refuses_or_rewrites_is_an_error(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = (Turn(U, "one"), Turn(A, "two", True), Turn(U, "three"), Turn(A, "four", True))
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    with pytest.raises(UserError, match=r"data.jsonl:7: .* rewrites earlier turns"):
        _encode(tokenizer, turns)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system turns') }}")
    with pytest.raises(UserError, match=r"data.jsonl:7: .* refuses .* no system turns"):
        _encode(tokenizer, turns)


def test_text_becomes_sequences_of_targets(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "0123456789" * 3 + "x"
    examples = encode_text(text, tokenizer, 10)
    assert [len(example) for example in examples] == [10, 10, 10]  # a lone token is left out
    assert "".join(tokenizer.decode(list(e.input_ids)) for e in examples) == text[:30]
    assert all(all(example.is_target) for example in examples)


def test_collate_pads_and_masks() -> None:
    examples = [Example((5, 6, 7), (False, True, True)), Example((8, 9), (False, True))]
    batch = collate(examples, pad_id=1, train_on_source=False)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]
    assert (batch.tokens, batch.targets) == (5, 3)
    batch = collate(examples, pad_id=1, train_on_source=True)
    assert batch.labels.tolist() == [[5, 6, 7], [8, 9, IGNORE]]
    assert batch.targets == 3  # nothing comes before the first token to predict it from


@pytest.mark.parametrize("group_by_length", [True, False])
def test_epochs_are_deterministic_permutations(group_by_length: bool) -> None:
    lengths = torch.randint(1, 500, (1001,), generator=torch.Generator().manual_seed(0)).tolist()

    def batches(seed: int, epoch: int) -> list[list[int]]:
        return epoch_batches(lengths, 4, group_by_length=group_by_length, seed=seed, epoch=epoch)

    first = batches(0, 0)
    assert first == batches(0, 0)
    assert first != batches(0, 1)
    assert first != batches(1, 0)
    assert sorted(i for batch in first for i in batch) == list(range(1001))
    assert sorted(len(batch) for batch in first) == [1] + [4] * 250
    padding = sum(
        max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch)
        for batch in first
    )
    if group_by_length:
        assert padding < 0.05 * sum(lengths)
    else:
        assert padding > 0.3 * sum(lengths)
