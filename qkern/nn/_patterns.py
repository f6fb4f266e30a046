"""PEFT's patterns for layers' paths, matched in bounded time.

A pattern may come with a stranger's file, and ``re`` can take longer than a life over one such as
``([a-z_.]+)+!``. Here the parsed expression is walked with sets of positions: from these, where can
this part end? Whether there is a match does not depend on the order of trying, so the answer is
that of ``re``. Each step takes all positions at once, and the steps are counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

try:  # Python 3.11 moved it
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:
    import sre_constants as ops
    import sre_parse as parser

MAX_LENGTH = 4096
"""Characters of a pattern: more than any list of layers' names that people write."""
_MAX_DEPTH = 30
"""Groups within groups, since each takes some of Python's stack."""
_MAX_STEPS = 20_000
"""Of one match. A name with a dozen wildcards takes some hundreds."""

# Expressions of these alone have one way to match, so that `re`, which is faster, is safe.
_ONE_WAY = re.compile(r"\^?(?:[\w.-]|\\[.-])*\$?")


def pattern_matches(key: str, path: str) -> bool:
    r"""Whether PEFT takes ``key`` of a rank or alpha pattern for the layer at ``path``.

    As ``re.match(rf"(.*\.)?({key})$", path)``: the path or its last components. Raises ValueError
    where that takes too many steps, which no expression does that people write for names.
    """
    if _ONE_WAY.fullmatch(key):
        return re.match(rf"(.*\.)?({key})$", path) is not None
    return _Matcher(path).ends(_parsed(key), 1) > 0


def check_pattern(name: str, key: object) -> None:
    """TypeError or ValueError, with ``name``, where ``key`` is no pattern that can be matched."""
    if not isinstance(key, str):
        raise TypeError(f"{name}: got the key {key!r}; takes names or regular expressions")
    try:
        if not _ONE_WAY.fullmatch(key):
            _parsed(key)
    except ValueError as error:
        shown = key if len(key) <= 60 else f"{key[:60]}..."
        raise ValueError(f"{name}: {shown!r}: {error}") from error


@functools.lru_cache(maxsize=4096)
def _parsed(key: str) -> Any:
    if len(key) > MAX_LENGTH:
        raise ValueError(f"got {len(key)} characters; takes at most {MAX_LENGTH}")
    try:
        tree = parser.parse(rf"(.*\.)?({key})$")
        _check_supported(tree, _MAX_DEPTH)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if tree.state.flags & ~re.UNICODE.value:
        raise ValueError("flags such as (?i) are not taken")
    return tree


def _check_supported(tree: Any, depth: int) -> None:
    if depth < 0:
        raise ValueError(f"takes at most {_MAX_DEPTH} groups and repetitions within one another")
    for op, argument in tree:
        if op not in _ENDS and op not in _CHARACTERS:
            raise ValueError(f"{str(op).lower()} is not taken")
        if op is ops.SUBPATTERN and (argument[1] or argument[2]):
            raise ValueError("flags such as (?i:...) are not taken")
        if op is ops.AT and argument not in _PLACES:
            raise ValueError(f"{str(argument).lower()} is not taken")
        if op is ops.IN:
            for kind, value in argument:
                if kind is ops.CATEGORY and value not in _CATEGORIES:
                    raise ValueError(f"{str(value).lower()} is not taken")
        for part in _parts(op, argument):
            _check_supported(part, depth - 1)


def _parts(op: Any, argument: Any) -> Iterable[Any]:
    """The expressions in an expression."""
    if op is ops.BRANCH:
        return tuple(argument[1])
    if op in (ops.SUBPATTERN, ops.MAX_REPEAT, ops.MIN_REPEAT, ops.ASSERT, ops.ASSERT_NOT):
        return (argument[-1],)
    return ()


class _Matcher:
    """One path. Sets of positions in it are integers: bit i is the place before character i."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps = 0
        self._fitting: dict[tuple[int, int], int] = {}

    def ends(self, tree: Any, positions: int) -> int:
        """Where matches of ``tree`` that begin at ``positions`` can end."""
        for index, (op, argument) in enumerate(tree):
            self.steps += 1
            if self.steps > _MAX_STEPS:
                raise ValueError(
                    f"a pattern takes more than {_MAX_STEPS} steps to match {self.path!r}"
                )
            if not positions:
                break
            if op in _CHARACTERS:
                positions = (positions & self._where(tree, index)) << 1
            else:
                positions = _ENDS[op](self, argument, positions)
        return positions

    def _where(self, tree: Any, index: int) -> int:
        """Positions of the characters that this part of ``tree`` takes."""
        key = id(tree), index
        if key not in self._fitting:
            op, argument = tree[index]
            fits = _CHARACTERS[op]
            self._fitting[key] = _bits(i for i, c in enumerate(self.path) if fits(argument, c))
        return self._fitting[key]

    def repeat(self, argument: Any, positions: int) -> int:
        """``(low, high, tree)``; how greedy it is makes no difference to what matches."""
        low, high, tree = argument
        count = 0
        while count < low and positions:
            following = self.ends(tree, positions)
            count = low if following == positions else count + 1
            positions = following
        found = positions
        while count < high and positions:
            positions = self.ends(tree, positions) & ~found
            found |= positions
            count += 1
        return found

    def branch(self, argument: Any, positions: int) -> int:
        return functools.reduce(int.__or__, (self.ends(tree, positions) for tree in argument[1]))

    def group(self, argument: Any, positions: int) -> int:
        return self.ends(argument[-1], positions)

    def place(self, argument: Any, positions: int) -> int:
        return _bits(at for at in self._each(positions) if _PLACES[argument](self.path, at))

    def ahead(self, argument: Any, positions: int) -> int:
        return _bits(at for at in self._each(positions) if self._looks(argument, at))

    def not_ahead(self, argument: Any, positions: int) -> int:
        return positions & ~self.ahead(argument, positions)

    def _each(self, positions: int) -> Iterator[int]:
        return (at for at in range(len(self.path) + 1) if positions >> at & 1)

    def _looks(self, argument: Any, at: int) -> bool:
        direction, tree = argument
        if direction > 0:
            return self.ends(tree, 1 << at) > 0
        width = tree.getwidth()[0]  # the parser took only expressions of one width
        return width <= at and self.ends(tree, 1 << (at - width)) >> at & 1 > 0


def _bits(positions: Iterable[int]) -> int:
    return sum(1 << at for at in positions)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_between(path: str, at: int) -> bool:
    before, after = at > 0 and _is_word(path[at - 1]), at < len(path) and _is_word(path[at])
    return before != after


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    ops.CATEGORY_WORD: _is_word,
    ops.CATEGORY_NOT_WORD: lambda character: not _is_word(character),
}


def _is_in(members: Any, character: str) -> bool:
    code = ord(character)
    found = negated = False
    for kind, value in members:
        if kind is ops.NEGATE:
            negated = True
        elif kind is ops.LITERAL:
            found |= value == code
        elif kind is ops.RANGE:
            found |= value[0] <= code <= value[1]
        else:
            found |= _CATEGORIES[value](character)
    return found != negated


_CHARACTERS: dict[Any, Callable[[Any, str], bool]] = {
    ops.LITERAL: lambda code, character: ord(character) == code,
    ops.NOT_LITERAL: lambda code, character: ord(character) != code,
    ops.ANY: lambda _, character: character != "\n",
    ops.IN: _is_in,
}
_PLACES: dict[Any, Callable[[str, int], bool]] = {
    ops.AT_BEGINNING: lambda _, at: at == 0,
    ops.AT_BEGINNING_STRING: lambda _, at: at == 0,
    ops.AT_END: lambda path, at: path[at:] in ("", "\n"),
    ops.AT_END_STRING: lambda path, at: at == len(path),
    ops.AT_BOUNDARY: _is_between,
    ops.AT_NON_BOUNDARY: lambda path, at: not _is_between(path, at),
}
_ENDS: dict[Any, Callable[[_Matcher, Any, int], int]] = {
    ops.MAX_REPEAT: _Matcher.repeat,
    ops.MIN_REPEAT: _Matcher.repeat,
    ops.BRANCH: _Matcher.branch,
    ops.SUBPATTERN: _Matcher.group,
    ops.AT: _Matcher.place,
    ops.ASSERT: _Matcher.ahead,
    ops.ASSERT_NOT: _Matcher.not_ahead,
}
