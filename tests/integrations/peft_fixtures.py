"""A fixture for the tests of PEFT, which name this module in `pytest_plugins`."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def qkern_peft() -> Any:
    """`qkern.integrations.peft`, registered for the test; that ends with any test."""
    pytest.importorskip("peft")
    from qkern.integrations import peft

    peft.register()
    return peft
