"""PEFT on models with 4-bit layers: one call of `register`, and PEFT's own code runs unchanged.

::

    from qkern.integrations import peft as qkern_peft

    qkern_peft.register()
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))

LoRA on a `qkern.nn.Linear4bit` is then computed by `qkern.lora_linear`, and DoRA, PiSSA, OLoRA,
LoftQ and merging work. Files are PEFT's own: they load in plain PEFT, on any base of these shapes.
"""

from __future__ import annotations

try:
    import peft as _peft
except ImportError as error:
    raise ImportError("peft: is not installed; pip install 'qkern[hf]'") from error

from packaging.version import Version

OLDEST = "0.21.0"
"""The oldest version of PEFT that is supported."""

if Version(_peft.__version__) < Version(OLDEST):
    raise ImportError(f"peft: got version {_peft.__version__}; takes {OLDEST} or newer")

from qkern.integrations import _peft_hooks  # noqa: E402
from qkern.integrations._peft_layers import QKernEmbedding, QKernLinear  # noqa: E402
from qkern.integrations._peft_loftq import replace_lora_weights_loftq  # noqa: E402
from qkern.integrations._peft_originals import original_weights  # noqa: E402

__all__ = [
    "QKernEmbedding",
    "QKernLinear",
    "original_weights",
    "register",
    "registered",
    "replace_lora_weights_loftq",
    "unregister",
]


def register() -> None:
    """Let PEFT know the 4-bit layers of qkern, in this process and from now on.

    PEFT looks at a list of its own for the class of an adapter's layer, and saves nothing else that
    could say it. So one entry of that list is replaced by a function that looks for 4-bit layers
    first, for every way to an adapter: ``get_peft_model``, ``PeftModel.from_pretrained``,
    ``load_adapter``, ``add_adapter`` of PEFT's and of transformers' models. A class that a
    configuration registers itself (``_register_custom_module``) is still taken first. Besides,
    parameter counts are those of the weights that codes stand for, ``replace_lora_weights_loftq``
    and ``prepare_model_for_kbit_training`` know these models, and what cannot work raises before
    anything is changed: 4-bit layers in ``modules_to_save``, tuners that compute with the dense
    weight, merging other tuners than LoRA.

    Layers that are adapted already stay as they are. Calling it again does nothing.
    """
    _peft_hooks.install()


def unregister() -> None:
    """Undo `register`; layers that are adapted already stay as they are."""
    _peft_hooks.remove()


def registered() -> bool:
    """Whether `register` is in force."""
    return _peft_hooks.is_installed()
