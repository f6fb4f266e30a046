"""The laboratory: how tests and benchmarks examine kernels without their devices."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout."""
