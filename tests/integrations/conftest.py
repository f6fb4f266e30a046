"""The side that a feature's test runs on."""

from __future__ import annotations

import pytest

from tests.integrations.record import Side


@pytest.fixture
def side(request: pytest.FixtureRequest) -> Side:
    """qkern's side, or the peer's; `tests.integrations.record.feature` chooses."""
    if request.param != "qkern":
        pytest.importorskip(request.param)
    return Side(request.param)
