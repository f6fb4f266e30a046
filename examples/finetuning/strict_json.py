"""JSON that says one thing only: an object with a key given twice is an error."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str) -> Any:
    """As ``json.loads``, NaN and infinities included.

    Raises ValueError for a repeated key, too, and for too much nesting.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"nested too deeply: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" is given twice')
    return found
