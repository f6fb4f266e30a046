"""docs/api.md says what the docstrings say."""

from __future__ import annotations

from pathlib import Path

import pytest

import api_page
import qkern
from qkern import ops


def test_the_page_is_current() -> None:
    assert api_page.PAGE.read_text("utf-8") == api_page.page(), "run: python -m tools.api_page"


def test_the_page_has_every_public_name_and_every_op() -> None:
    page = api_page.PAGE.read_text("utf-8")
    names = [*api_page.public(qkern), *api_page.public(qkern.nn), *ops.OPS]
    assert {"nf4_linear", "Linear4bit", "adamw_step"} <= set(names)
    assert [name for name in names if f"### {name}\n" not in page] == []
    for names, member in (
        ("`Embedding4bit`, `Experts4bit`, `Linear4bit`", "quantized"),
        ("`QuantizedExperts`, `QuantizedTensor`", "numel"),
    ):
        common = page.split(f"### What {names} have in common")[1].split("\n## ")[0]
        assert f"#### {member}\n" in common
        assert "\n- `_" not in common
    # Not an address, which differs from run to run.
    assert " at 0x" not in page


def test_a_stale_page_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api_page, "PAGE", tmp_path / "api.md")
    assert api_page.main([]) == 0
    assert api_page.main(["--check"]) == 0
    text = api_page.PAGE.read_text("utf-8").replace("bias: Tensor | None = None", "bias", 1)
    api_page.PAGE.write_text(text, "utf-8")
    assert api_page.main(["--check"]) == 1
    assert "bias: Tensor | None = None" in capsys.readouterr().err


def test_docstrings_become_lists_and_code() -> None:
    text = """Says ``what``.

``x``
    float32.

Args:
    y: Two,
        lines.

Raises:
    TypeError, ValueError: Wrong.

Use it::

    call(y)

Then :func:`~qkern.nn.done`."""
    assert (
        api_page.markdown(text)
        == """Says `what`.

- `x`:
  float32.

*Args*

- `y`: Two,
  lines.

*Raises*

- `TypeError, ValueError`: Wrong.

Use it:

```python
call(y)
```

Then `qkern.nn.done`."""
    )
