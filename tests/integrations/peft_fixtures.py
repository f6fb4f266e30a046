"""A fixture for the tests of PEFT, which name this module in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def qkern_peft() -> Iterator[Any]:
    """`qkern.integrations.peft`, registered for the test."""
    pytest.importorskip("peft")
    from qkern.integrations import peft

    was = peft.registered()
    peft.register()
    yield peft
    if not was:
        peft.unregister()
