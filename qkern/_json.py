"""JSON of files: read strictly, its values checked against the kinds that are taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a value must be: in words, and as a predicate."""

    takes: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.takes} or {other.takes}", lambda v: self.fits(v) or other.fits(v))


# `type(...) is`, since True is an int to isinstance.
NULL = Kind("null", lambda v: v is None)
FLAG = Kind("true or false", lambda v: type(v) is bool)
TEXT = Kind("a string", lambda v: type(v) is str)
INTEGER = Kind("an integer", lambda v: type(v) is int)
NUMBER = Kind("a number that is finite", lambda v: type(v) in (int, float) and _is_finite(v))
SIZES = Kind(
    "a list of integers from 0",
    lambda v: type(v) is list and all(type(size) is int and size >= 0 for size in v),
)


def list_of(kind: Kind, words: str) -> Kind:
    """Lists of such values; ``words`` say what they are."""
    return Kind(f"a list of {words}", lambda v: type(v) is list and all(map(kind.fits, v)))


def map_of(kind: Kind, words: str) -> Kind:
    """Objects with such values; ``words`` say what they are."""
    return Kind(
        f"an object of {words}", lambda v: type(v) is dict and all(map(kind.fits, v.values()))
    )


def read_object(name: str, text: str | bytes) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises ValueError, beginning with ``name``, for other text, and where a key is given twice: of
    such a file two readers may take different values.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in found if keys.count(key) > 1)
            raise _TwiceError(f"{name}: has the key {twice!r} twice")
        return found

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique)
    except _TwiceError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: got {type(value).__name__}; takes a JSON object")
    return value


def check_fields(name: str, fields: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """ValueError, beginning with ``name``, where a field that is there is not of its kind."""
    for key, kind in kinds.items():
        if key in fields and not kind.fits(fields[key]):
            raise ValueError(f"{name}: {key}: got {_shown(fields[key])}; takes {kind.takes}")


class _TwiceError(ValueError):
    pass


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_finite(value: float) -> bool:
    return abs(value) <= sys.float_info.max
