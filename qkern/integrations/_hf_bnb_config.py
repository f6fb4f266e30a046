"""bitsandbytes' config, made and read without bitsandbytes."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig


def new_config(**fields: Any) -> Any:
    """A ``BitsAndBytesConfig`` with these fields."""
    return BitsAndBytesConfig(**fields)
