"""Limits of the machine that are found at once."""

from __future__ import annotations

import pytest
from bench import machine


@pytest.fixture
def quick_probes(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(machine, "probe_buffer_bytes", lambda cache: 1 << 20)
    monkeypatch.setattr(machine, "_MATMUL_SIZE", 64)
