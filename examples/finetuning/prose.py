"""What is no prose, by its name or by what is in it: it is not trained on as a text."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

JSON_NAMES = (".json", ".jsonl", ".ndjson")
TEXT_OF_JSON_LINES = "jq -r .text FILE.jsonl > FILE.txt"

_TAKES = "takes UTF-8 text, or JSON Lines in a known form"
_TABLE = "a table's columns make records: one JSON object a line"
_NAMES = {
    suffix: reason
    for suffixes, reason in (
        (JSON_NAMES, f"JSON, not prose; of texts in JSON Lines, {TEXT_OF_JSON_LINES}"),
        ((".csv", ".tsv", ".parquet", ".arrow", ".xlsx"), f"a table, not prose: {_TABLE}"),
        ((".html", ".htm", ".xml", ".svg"), "markup, not prose: extract its text"),
        ((".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf"), "no plain text: extract it"),
        ((".gz", ".zip", ".xz", ".bz2", ".zst", ".tar", ".7z"), "an archive: unpack it"),
        ((".safetensors", ".bin", ".pt", ".pth", ".gguf"), "binary, not prose"),
        ((".pkl", ".npy", ".npz", ".db", ".sqlite"), "binary, not prose"),
    )
    for suffix in suffixes
}
_MAGIC = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"%PDF": "PDF",
    b"PK\x03\x04": "a ZIP archive (or a document or spreadsheet in one)",
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"SQLite format 3": "SQLite",
    b"\x89PNG": "PNG",
    b"GGUF": "GGUF",
    b"{\\rtf": "RTF",
}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Tabs, line ends, form feeds and the escapes of terminals occur in text.
_CONTROL = re.compile(r"[\x00-\x07\x0e-\x1a\x1c-\x1f]")
_MARKUP = re.compile(r"\s*<(!doctype|\?xml|html|head|body|svg|rss)\b", re.IGNORECASE)
_END_TAG = re.compile(r"</[a-z]\w*>", re.IGNORECASE)
# Markdown begins with a tag too, and Wikipedia's markup with two brackets.
_BEGINS_AS_JSON = re.compile(r'\s*(\{\s*"(\\.|[^"\\])*"\s*:|\[\s*[\[{]\s*")')
_LINES = 50  # of a file, that tell JSON Lines and tables
_HEAD = 4096  # characters, that tell markup
_HEADER_CELL = re.compile(r'"?[A-Za-z_][\w .()/-]{0,39}"?')


def refused_name(path: Path) -> str | None:
    """Why a file of this name is not prose; None where it may be."""
    return _NAMES.get(path.suffix.lower())


def refused_bytes(line: bytes) -> str | None:
    """Why a file that begins with this line is no text in UTF-8; None where it may be."""
    if line.startswith(_UTF_16):
        return "not UTF-8 but UTF-16: iconv -f utf-16 -t utf-8 converts it"
    for magic, name in _MAGIC.items():
        if line.startswith(magic):
            return f"not text but {name}; {_TAKES}"
    return None


def refused_content(text: str) -> str | None:
    """Why a text is not prose; None where it may be."""
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        return f"binary, not prose: the control character {found[0]!r} in line {line}"
    if _is_json(text):
        return (
            "JSON, not prose; in JSON Lines with the fields of a known form it is data, and of "
            f"texts {TEXT_OF_JSON_LINES} makes prose"
        )
    if _MARKUP.match(text) or _is_mostly_tags(text[:_HEAD]):
        return "markup, not prose: extract its text"
    if _is_table(text):
        return f"a table, not prose: {_TABLE}"
    return None


def _is_mostly_tags(text: str) -> bool:
    count = len(_END_TAG.findall(text))
    return count >= 3 and 80 * count > len(text)


def begins_as_json(text: str) -> bool:
    """Whether a text, or its first line, is an object or array in JSON or the beginning of one."""
    return _BEGINS_AS_JSON.match(text) is not None or (
        text.lstrip().startswith(("{", "[")) and _parses(text)
    )


def _is_json(text: str) -> bool:
    if begins_as_json(text) or _parses(text):
        return True
    lines = [line for line in text.splitlines() if line.strip()][:_LINES]
    return all(map(_parses, lines))


def _parses(text: str) -> bool:
    if not text.strip().startswith(("{", "[", '"')):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_table(text: str) -> bool:
    """Whether every line has the cells of a header, whose delimiter no space follows."""
    lines = [line for line in text.splitlines() if line.strip()][:_LINES]
    for delimiter in ",\t;|":
        if len(lines) < 2 or delimiter not in lines[0] or f"{delimiter} " in lines[0]:
            continue
        header, *rows = _rows(lines, delimiter)
        # The last may go on in a line that was not looked at.
        if all(map(_HEADER_CELL.fullmatch, header)) and all(
            len(row) == len(header) for row in (rows[:-1] or rows)
        ):
            return True
    return False


def _rows(lines: list[str], delimiter: str) -> list[list[str]]:
    """The cells of lines, however long: the reader's own limit is 131,072 characters."""
    before = csv.field_size_limit(sum(map(len, lines)) + len(lines))
    try:
        return list(csv.reader(lines, delimiter=delimiter))
    finally:
        csv.field_size_limit(before)
