"""Plants small bugs in qkern's Python and runs the quick tests: each bug must make one fail.

    python -m tools.mutation                               # the sample that `make mutants` runs
    python -m tools.mutation --seed 7 --only qkern/nn      # another one, of some files
    python -m tools.mutation --list                        # only name the bugs

A bug is one change: a comparison, a constant by one, an operator, a negated condition, a dropped
``not``, a removed statement or ``raise``, two arguments swapped. A sample is seeded, and where code
changes only its part of the sample does. Every bug is planted in a copy of the tree. What survives
all tests, and must, for nobody can see what it changes, stands in ``mutation_survivors.txt`` with
the reason. Of all others 97 % must be noticed: below that the exit status is 1, as it is where
tests fail without a bug.

Bugs in the kernels have a laboratory of their own: ``tools/lab``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
SURVIVORS = Path(__file__).with_name("mutation_survivors.txt")
COUNT = 80
RATE = 0.97
"""Of the bugs that are not listed, so many must be noticed."""
TIME_LIMIT = 600.0
"""Seconds for the tests of one bug; a bug that makes them run on is noticed."""
PRELOADED = ("torch", "scipy", "transformers", "peft", "bitsandbytes")
"""What tests import, imported once for all of them."""
EVERY_NAME = "tests/suite/test_public_names.py::test_the_check_passes"
"""A test that calls every public name, in a few seconds."""
MOST_CALLERS = 12
MOST_NEAR = 20
"""Tests that are run before all others, for they are the likeliest to notice."""

ROOMS = {
    "qkern/nn/": ("tests/nn", "tests/io", "tests/finetune"),
    "qkern/io/": ("tests/io", "tests/nn"),
    "qkern/optim/": ("tests/optim",),
    "qkern/testing/": ("tests/ops", "tests/suite", "tests/benchmarks"),
    "qkern/backends/_cuda": ("tests/cuda", "tests/api", "tests/optim"),
    "qkern/backends/_triton": ("tests/triton", "tests/api"),
    "qkern/backends/": ("tests/api", "tests/cpu", "tests/ops", "tests/nn", "tests/cuda"),
    "qkern/reference.py": ("tests/ops", "tests/api", "tests/optim"),
    "qkern/": ("tests/api", "tests/ops", "tests/nn", "tests/cpu", "tests/io"),
}
"""The rooms whose tests are for a file: the first entry that its path begins with."""

LEFT_OUT = (
    "qkern/triton_kernels/",  # in Triton's language
    "qkern/testing/specs/",  # inputs of tests: another value is another input
    "qkern/testing/_values.py",
    "qkern/backends/_cuda_paths.py",  # a model of time: another number is another guess
)

_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Bug:
    """A change of the text between two places of a file, counted in bytes."""

    path: str
    function: str
    before: str
    after: str
    occurrence: int
    start: int
    end: int

    def __str__(self) -> str:
        again = f" #{self.occurrence}" if self.occurrence > 1 else ""
        return f"{self.path} | {self.function} | {self.before} -> {self.after}{again}"

    def planted(self, source: bytes) -> bytes:
        """The file's text with the bug."""
        return source[: self.start] + self.after.encode() + source[self.end :]


def _changed(node: ast.AST, **fields: object) -> str:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return f"({ast.unparse(other)})"


def _of_expression(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Compare(ops=[op]):
            yield _changed(node, ops=[_COMPARISONS[type(op)]()])
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            yield _changed(node, op=_OPERATORS[type(op)]())
        case ast.BoolOp(op=op):
            yield _changed(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=bool() as value):
            yield str(not value)
        case ast.Constant(value=int() as value):
            yield str(value + 1)
        case ast.Constant(value=float() as value):
            yield str(2 * value or 1.0)
        case ast.IfExp(test=test):
            yield _changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Call(args=[first, second, *rest]):
            starred = any(isinstance(argument, ast.Starred) for argument in (first, second))
            if not starred and ast.unparse(first) != ast.unparse(second):
                yield _changed(node, args=[second, first, *rest])


def _of_statement(node: ast.stmt) -> Iterator[tuple[ast.AST, str]]:
    """What is replaced, and by what."""
    match node:
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case ast.Return(value=ast.expr() as value):
            if not (isinstance(value, ast.Constant) and value.value is None):
                yield node, "return None"
        case ast.If(test=test) if not _for_types(node):
            yield test, f"(not ({ast.unparse(test)}))"


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Those in which a bug matters: no annotation, no decorator, no text of an error."""
    if isinstance(node, (ast.Assert, ast.JoinedStr, ast.Raise)) or _for_types(node):
        return
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
        return
    left_out = {"annotation", "returns", "decorator_list", "type_params"}
    for name, value in ast.iter_fields(node):
        if name not in left_out:
            values = value if isinstance(value, list) else [value]
            yield from (child for child in values if isinstance(child, ast.AST))


def bugs_of(path: str, source: bytes) -> list[Bug]:
    """Every bug that can be planted in a file."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Bug] = []
    seen: Counter[tuple[str, str, str]] = Counter()

    def add(function: str, node: ast.AST, after: str) -> None:
        start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        before = " ".join(ast.unparse(node).split())
        seen[function, before, after] += 1
        found.append(Bug(path, function, before, after, seen[function, before, after], start, end))

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.expr):
            for after in _of_expression(node):
                add(function, node, after)
        elif isinstance(node, ast.stmt):
            for part, after in _of_statement(node):
                add(function, part, after)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        elif not function and isinstance(node, (ast.Assign, ast.AnnAssign)):
            function = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for child in _children(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def files() -> list[str]:
    """The files that bugs are planted in."""
    found = (path.relative_to(ROOT).as_posix() for path in ROOT.glob("qkern/**/*.py"))
    return sorted(path for path in found if not path.startswith(LEFT_OUT))


def all_bugs(only: Iterable[str] = ("qkern/",)) -> list[Bug]:
    """Those of the files whose path begins with one of ``only``."""
    chosen = [path for path in files() if path.startswith(tuple(only))]
    return [bug for path in chosen for bug in bugs_of(path, (ROOT / path).read_bytes())]


def sample(bugs: Iterable[Bug], seed: int, count: int) -> list[Bug]:
    """``count`` of them: the same for the same code, and nearly so for code that is nearly so."""
    return sorted(bugs, key=lambda bug: hashlib.sha256(f"{seed} {bug}".encode()).digest())[:count]


def survivors() -> dict[str, str]:
    """The bugs that no test can notice, with the reasons."""
    lines = (line.rpartition(" | ") for line in SURVIVORS.read_text("utf-8").splitlines())
    return {bug: reason for bug, _, reason in lines if not bug.startswith("#") and bug}


@cache
def _functions(path: Path) -> list[tuple[str, str]]:
    """Name and text of a file's functions, classes and constants, and of methods, `Class::name`."""
    found = []

    def add(nodes: Iterable[ast.stmt], within: str) -> None:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.append((within + node.name, ast.unparse(node)))
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{node.name}::")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name):
                    found.append((within + target.id, ast.unparse(node)))

    add(ast.parse(path.read_text("utf-8")).body, "")
    return found


def _words(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")


def _callers(bug: Bug) -> list[str]:
    """Names by which a test may reach a bug: the function's, its class's, those of callers."""
    names = [name for name in reversed(bug.function.split(".")) if not name.startswith("__")]
    for name in names:  # which grows meanwhile
        private = name.startswith("_")
        for path in (bug.path, *(() if private else files())):
            for full, text in _functions(ROOT / path):
                other = full.rpartition("::")[2]
                known = other in names or other.startswith("__") or len(names) >= MOST_CALLERS
                if not known and _words([name]).search(text):
                    names.append(other)
    return names


def _parts(words: Iterable[str]) -> set[str]:
    """Names, and the words that they are made of."""
    found = set(words)
    return found | {part for word in found for part in word.split("_") if len(part) > 3}


@cache
def _tests(root: Path) -> dict[str, tuple[set[str], set[str]]]:
    """The words of each quick test, and those of what it names in its file: tables, helpers."""
    found = {}
    for path in sorted((root / "tests").glob("*/test_*.py")):
        texts = dict(_functions(path))
        words = {name: set(re.findall(r"\w+", text)) for name, text in texts.items()}
        for test, text in texts.items():
            if test.rpartition("::")[2].startswith("test_") and "mark.slow" not in text:
                within, done = set(words[test]), {test}
                while todo := within & words.keys() - done:
                    within |= set().union(*(words[name] for name in todo))
                    done |= todo
                own = _parts({path.stem, *words[test]})
                found[f"{path.relative_to(root).as_posix()}::{test}"] = own, _parts(within) - own
    return found


def near_and_all(bug: Bug, root: Path = ROOT) -> tuple[list[str], list[str]]:
    """Tests that have words in common with the bug, and the files of all that are for it.

    The rarer a word is in tests, the more it says; and the nearer a caller is. Of the files those
    come first that are called like the bug's own, then those with the most of the former tests.
    """
    rooms = next(rooms for start, rooms in ROOMS.items() if bug.path.startswith(start))
    tests = _tests(root)
    stem = Path(bug.path).stem.strip("_")
    common = Counter(word for own, _ in tests.values() for word in own)
    named = [_parts([name]) for name in _callers(bug)]
    changed = _parts([stem, *re.findall(r"[A-Za-z_]\w{3,}", bug.before)])
    value: Counter[str] = Counter()
    for rank, words in enumerate([changed, *named]):
        for word in words & common.keys():
            rarity = math.log(len(tests) / common[word])
            value[word] = max(value[word], rarity / (1 + rank / 3))
    near, of_file = [], Counter[str]()
    for test, (own, further) in tests.items():
        file = test.partition("::")[0]
        if file.startswith(tuple(f"{room}/" for room in rooms)):
            said = sum(value[word] for word in own & value.keys())
            said += sum(value[word] for word in further & value.keys()) / 2
            near.append((-said / math.log(50 + len(own)), test))
            of_file[file] = max(of_file[file], said)
    near.sort()
    files = {
        path.relative_to(root).as_posix()
        for room in rooms
        for path in (root / room).glob("test_*.py")
    }
    first = sorted(files, key=lambda file: (f"/test_{stem}" not in file, -of_file[file], file))
    return [test for _, test in near[:MOST_NEAR]], first


class Tree:
    """A copy of the checkout, to plant bugs in and run tests in."""

    def __init__(self, into: Path) -> None:
        self.root = into
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in listed.stdout.splitlines():
            if (ROOT / name).exists():
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, into / name, follow_symlinks=False)
        for library in ROOT.glob("qkern/_C*.so"):
            (into / "qkern" / library.name).symlink_to(library)
        if (ROOT / "build").exists():  # of the emulator, which has its own hash of what it is of
            (into / "build").symlink_to(ROOT / "build")

    def test(self, *arguments: str) -> str | None:
        """What fails first among these tests; None where all pass."""
        options = ["-q", "-x", "-n0", "-m", "not slow", "-p", "no:cacheprovider", "-rfE"]
        report = self.root.with_suffix(".txt")
        child = os.fork()
        if not child:
            self._become_pytest(report, [*options, *arguments])
        try:
            state = self._waited_for(child)
        except BaseException:  # an interrupt leaves no tests behind
            os.killpg(child, signal.SIGKILL)
            raise
        if state is None:
            return f"more than {TIME_LIMIT:.0f} s"
        status, said = os.waitstatus_to_exitcode(state), report.read_text(errors="replace")
        if status == 0:
            return None
        if failed := re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE):
            return failed[1]
        if status < 0 or "while loading conftest" in said:
            return f"exit status {status}"
        raise RuntimeError(f"pytest: exit status {status}\n{said[-2000:]}")

    @staticmethod
    def _waited_for(child: int) -> int | None:
        """How a process ended; None where it had to be ended."""
        end = time.monotonic() + TIME_LIMIT
        while (state := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.05)
        return state[1]

    def _become_pytest(self, report: Path, arguments: list[str]) -> NoReturn:
        """A fork runs pytest: what is imported here is there already, and qkern is not."""
        status = 70
        try:
            os.setpgid(0, 0)
            with report.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(self.root)
            sys.path[:] = [str(self.root), *(path for path in sys.path if path != str(ROOT))]
            os.environ["PYTHONPATH"] = str(self.root)
            # A file changes within a second, which a cache of its code would not see.
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True
            for name in [
                name for name in sys.modules if name.partition(".")[0] in ("tools", "lab")
            ]:
                del sys.modules[name]
            import pytest

            status = int(pytest.main(arguments))
        except Exception:  # noqa: BLE001 (a fork ends here, whatever happens)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


@dataclass
class Outcome:
    """What became of a bug."""

    bug: Bug
    noticed_by: str | None
    seconds: float


def _try_out(bug: Bug, tree: Tree) -> Outcome:
    path, start = tree.root / bug.path, time.monotonic()
    source = path.read_bytes()
    path.write_bytes(bug.planted(source))
    near, rooms = near_and_all(bug, tree.root)
    try:
        noticed_by = tree.test(EVERY_NAME, *near) or tree.test(*rooms)
    finally:
        path.write_bytes(source)
    return Outcome(bug, noticed_by, time.monotonic() - start)


def run(bugs: Iterable[Bug]) -> Iterator[Outcome]:
    """Plant each and test; AssertionError where a test that noticed one fails without it too."""
    for name in ("pytest", "hypothesis", *PRELOADED):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="qkern-mutation-") as folder:
        tree = Tree(Path(folder) / "tree")
        noticed = set()
        for bug in bugs:
            outcome = _try_out(bug, tree)
            if (outcome.noticed_by or "").startswith("tests/"):
                noticed.add(outcome.noticed_by)
            yield outcome
        fails = tree.test(*sorted(noticed)) if noticed else None
        assert fails is None, f"fails without a bug: {fails}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sample and print what became of each bug; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT, help=f"bugs; default {COUNT}")
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n parts of the sample")
    parser.add_argument("--only", nargs="+", default=["qkern/"], help="beginnings of paths")
    parser.add_argument("--list", action="store_true", help="plant nothing")
    args = parser.parse_args(argv)
    part, parts = map(int, args.part.split("/"))
    chosen = sample(all_bugs(args.only), args.seed, args.count)[part - 1 :: parts]
    if args.list:
        print(*chosen, sep="\n")
        return 0
    known = survivors()
    score: Counter[str] = Counter()
    for outcome in run(chosen):
        listed = "listed" if str(outcome.bug) in known else "SURVIVED"
        kind = "noticed" if outcome.noticed_by else listed
        score[kind] += 1
        print(f"{kind} ({outcome.seconds:.0f} s): {outcome.bug}")
        print(f"    {outcome.noticed_by or ''}", flush=True)
    noticed, survived = score["noticed"], score["SURVIVED"]
    counted = noticed + survived
    rate = f"{noticed / (counted or 1):.1%}".replace("%", " %")
    print(
        f"{noticed} of {counted} noticed ({rate}; takes {100 * RATE:.0f} %), "
        f"{score['listed']} in {SURVIVORS.name}"
    )
    return status(noticed, survived)


def status(noticed: int, survived: int) -> int:
    """The exit status: 0 where enough of the bugs that are not listed were noticed."""
    return 0 if noticed >= RATE * (noticed + survived) else 1


if __name__ == "__main__":
    sys.exit(main())
