"""The demo's data: the standard library's own documentation, as questions and answers.

``pydoc_data.topics`` ships with every Python: some 80 topics of the language reference. The model
is asked for the documentation of a topic, or to continue it from a given place. A few topics are
held out whole. The reference repeats itself ("compound" contains all of "while"), so a paragraph is
used once, and by the held-out topics first: the held-out text is never trained on.
"""

from __future__ import annotations

import textwrap
from pydoc_data.topics import topics

from .data import Conversation, Turn

HELD_OUT_TOPICS = (
    *("while", "assert", "lambda", "booleans"),
    *("slicings", "context-managers", "exprlists", "nonlocal"),
)
_CHUNK_CHARS = 700  # about 200 tokens
_CONTEXT_CHARS = 200
_COMMON_CHARS = 60  # shorter paragraphs ("See also:") recur by nature


def question(topic: str) -> str:
    return f'What does Python\'s documentation say about "{topic}"?'


def topic_conversations() -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out), the same on every run with one version of Python."""
    seen: set[str] = set()
    held_out = [c for topic in HELD_OUT_TOPICS for c in _conversations(topic, seen)]
    train = [
        c
        for topic in sorted(topics)
        if topic not in HELD_OUT_TOPICS
        for c in _conversations(topic, seen)
    ]
    return train, held_out


def _conversations(topic: str, seen: set[str]) -> list[Conversation]:
    conversations = []
    before = ""
    for chunk in _chunks(_new_paragraphs(topics[topic], seen)):
        prompt = question(topic)
        if before:
            prompt = f'Continue Python\'s documentation on "{topic}" after this:\n\n{before}'
        turns = (Turn("user", prompt), Turn("assistant", chunk, is_target=True))
        conversations.append(Conversation(turns, f"topic {topic}"))
        before = chunk[-_CONTEXT_CHARS:].partition("\n")[2] or chunk[-_CONTEXT_CHARS:]
    return conversations


def _new_paragraphs(text: str, seen: set[str]) -> list[str]:
    paragraphs = []
    for paragraph in text.split("\n\n"):
        # Nested sections repeat a paragraph at another indentation, wrapped elsewhere.
        key = " ".join(paragraph.split())
        if not key or key in seen:
            continue
        if len(key) >= _COMMON_CHARS:
            seen.add(key)
        paragraphs.append(paragraph.strip("\n"))
    return paragraphs


def _chunks(paragraphs: list[str]) -> list[str]:
    chunks: list[str] = []
    for paragraph in paragraphs:
        for piece in _pieces(paragraph):
            if chunks and len(chunks[-1]) + len(piece) + 2 <= _CHUNK_CHARS:
                chunks[-1] += "\n\n" + piece
            else:
                chunks.append(piece)
    return [textwrap.dedent(chunk) for chunk in chunks]


def _pieces(paragraph: str) -> list[str]:
    """A paragraph cut at line ends where it is longer than a chunk (tables, long examples)."""
    pieces = [""]
    for line in paragraph.splitlines():
        if pieces[-1] and len(pieces[-1]) + len(line) + 1 > _CHUNK_CHARS:
            pieces.append("")
        pieces[-1] += ("\n" if pieces[-1] else "") + line
    return pieces
