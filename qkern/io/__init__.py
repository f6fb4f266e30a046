"""Reading and writing other libraries' files: PEFT's adapters and bitsandbytes' 4-bit weights."""

from qkern.io.adapters import load_adapter, save_adapter
from qkern.io.bnb import load_bnb, save_bnb

__all__ = ["load_adapter", "load_bnb", "save_adapter", "save_bnb"]
