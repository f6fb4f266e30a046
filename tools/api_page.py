"""Writes docs/api.md, the page of all public names, from their docstrings.

    python -m tools.api_page            # write the page
    python -m tools.api_page --check    # exit 1, showing the difference, when the page is stale

`make lint` checks it. The names are those of ``__all__``; of a class also its public methods and
properties that qkern itself defines. No kernel and no backend is needed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qkern.formats import keep_current

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

MODULES = ("qkern", "qkern.nn", "qkern.io", "qkern.optim", "qkern.testing")
BACKENDS = ("use", "select", "selected_name", "available", "Backend")
"""Names of qkern.backends that are for users."""

HEAD = """\
# API

<!-- Written by tools/api_page.py from the docstrings: change those, then run it. -->

Shapes are in brackets: `[out_features, in_features]`. Dtypes are torch's.
"""
OPS_HEAD = """\
## torch.ops.qkern

What the functions above call. An op checks what would be unsafe and explains little; it has no
gradient of its own (`qkern.autograd`). A 4-bit weight is seven arguments, in the order of
`qkern.QuantizedTensor.weight`, so that a call reads `op(x, *qw.weight, ...)`.
"""


def public(module: ModuleType) -> list[str]:
    """What a module exports, without submodules and its version."""
    names = [name for name in module.__all__ if not name.startswith("__")]
    return [name for name in names if not isinstance(getattr(module, name), ModuleType)]


def markdown(text: str) -> str:
    """A docstring as Markdown: names of arguments with indented text become lists."""
    text = re.sub(r":(?:func|class|meth|mod|attr):`~?([^`]+)`", r"`\1`", text)
    text = text.replace("``", "`")
    lines: list[str] = []
    section = code = False
    for line in text.splitlines():
        if code and line.strip() and not line.startswith("    "):
            lines.append("```\n")
            code = False
        if code:
            lines.append(line[4:])
            continue
        if line.endswith("::"):
            lines += [line[:-1], "", "```python"]
            code = True
            continue
        if match := re.match(r"^(Args|Raises|Returns|Yields|Attributes):$", line):
            lines += [f"*{match[1]}*", ""]
            section = True
        elif section and (match := re.match(r"^    ([\w*][\w*., ]*):(?= |$)(.*)$", line)):
            lines.append(f"- `{match[1]}`:{match[2]}")
        elif match := re.match(r"^(`[^`]+`(?:, `[^`]+`)*)$", line):
            lines.append(f"- {match[1]}:")
        elif line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            section = section and not line.strip()
            lines.append(line)
    if code:
        lines.append("```")
    made = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return made.replace("```python\n\n", "```python\n").replace("\n\n```\n", "\n```\n")


def _annotation(value: Any) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)


def signature(name: str, function: Any) -> str:
    """A call as it may be written, a parameter a line where it is long."""
    found = inspect.signature(function)
    parts: list[str] = []
    kinds = inspect.Parameter
    starred = False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is kinds.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or parameter.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        star = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        part = star + parameter.name
        if parameter.annotation is not kinds.empty:
            part += f": {_annotation(parameter.annotation)}"
        if parameter.default is not kinds.empty:
            shown = repr(parameter.default)
            # A function or an object's own default factory: its address would change.
            part += " = ..." if shown.startswith("<") else f" = {shown}"
        parts.append(part)
    result = ""
    if found.return_annotation is not inspect.Signature.empty and not inspect.isclass(function):
        result = f" -> {_annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= 88:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def _entry(title: str, call: str, text: str, level: int = 3) -> str:
    call = f"```python\n{call}\n```\n\n" if call else ""
    return f"{'#' * level} {title}\n\n{call}{text}\n"


def _field_docs(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Names that are assigned in a body and have a string after them, with the string."""
    body: list[ast.stmt] = getattr(node, "body", [])
    for statement, after in itertools.pairwise(body):
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        if not isinstance(after, ast.Expr) or not isinstance(after.value, ast.Constant):
            continue
        if isinstance(after.value.value, str):
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, inspect.cleandoc(after.value.value)


def _own(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class that qkern defines and documents."""
    for name, value in vars(cls).items():
        plain = getattr(value, "__func__", value)
        if not name.startswith("_") and (inspect.isfunction(plain) or isinstance(value, property)):
            yield name, value


def of_class(name: str, cls: type) -> str:
    """A class: how it is made, its text, fields, methods and properties."""
    call = "" if issubclass(cls, BaseException) else signature(name, cls)
    text = markdown(inspect.getdoc(cls) or "")
    tree = ast.parse(inspect.getsource(cls))
    fields = [
        f"- `{field}`: {markdown(doc)}"
        for field, doc in _field_docs(tree.body[0])
        if not field.startswith("_")
    ]
    if fields:
        text += "\n\n" + "\n".join(fields)
    parts = [_entry(name, call, text)]
    for member, value in _own(cls):
        doc = markdown(inspect.getdoc(value) or "")
        if isinstance(value, property):
            parts.append(_entry(f"{name}.{member}", "", doc, 4))
        elif doc:
            function = getattr(value, "__func__", value)
            parts.append(_entry(f"{name}.{member}", signature(member, function), doc, 4))
    return "\n".join(parts)


def of_bases(classes: Mapping[str, type]) -> str:
    """What classes have in common, by bases of theirs that are qkern's and not public."""
    heirs: dict[type, list[str]] = {}
    for name, cls in classes.items():
        for base in cls.__mro__[1:]:
            if base.__module__.startswith("qkern.") and base not in classes.values():
                heirs.setdefault(base, []).append(name)
    parts = []
    for base, names in heirs.items():
        title = f"What {', '.join(f'`{name}`' for name in names)} have in common"
        body = of_class(base.__name__, base).partition("```\n\n")[2]
        parts.append(f"### {title}\n\n{body.replace(f'#### {base.__name__}.', '#### ')}")
    return "\n".join(parts)


def _constant(module: ModuleType, name: str) -> str:
    """What the string after an assignment says, in the module or in the one it comes from."""
    tree = ast.parse(inspect.getsource(module))
    for where, doc in _field_docs(tree):
        if where == name:
            return _entry(name, "", markdown(doc))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(a.name == name for a in node.names):
            return _constant(importlib.import_module(str(node.module)), name)
    return _entry(name, "", "")


def of_module(module: ModuleType, names: Sequence[str]) -> str:
    """The section of a module."""
    text = markdown(inspect.getdoc(module) or "")
    parts = [f"## {module.__name__}\n\n{text}\n"]
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value):
            parts.append(of_class(name, value))
        elif inspect.isfunction(value):
            parts.append(
                _entry(name, signature(name, value), markdown(inspect.getdoc(value) or ""))
            )
        else:
            parts.append(_constant(module, name))
    classes = {n: c for n in names if inspect.isclass(c := getattr(module, n))}
    return "\n".join([*parts, *filter(None, [of_bases(classes)])])


def of_ops() -> str:
    """The schemas, with what the reference says of each."""
    from qkern import ops, reference

    parts = [OPS_HEAD]
    for name, op in sorted(ops.OPS.items()):
        schema = re.sub(r"\s+", " ", op.torch_schema)
        before, result = schema.split(") -> ")
        start, _, arguments = before.partition("(")
        lines = re.sub(r", (?![^\[]*\])", ",\n    ", arguments)
        call = f"{start}(\n    {lines},\n) -> {result}" if len(schema) > 88 else schema
        text = markdown(inspect.getdoc(getattr(reference, name)) or "")
        parts.append(f"### {name}\n\n```\n{call}\n```\n\n{text}\n")
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    from qkern import backends

    modules = [importlib.import_module(name) for name in MODULES]
    parts = [HEAD, *(of_module(module, public(module)) for module in modules)]
    parts += [of_module(backends, BACKENDS), of_ops()]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or with ``--check`` compare it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/api.md.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when stale")
    args = parser.parse_args(argv)
    return keep_current(PAGE, page(), "python -m tools.api_page", args.check)


if __name__ == "__main__":
    sys.exit(main())
