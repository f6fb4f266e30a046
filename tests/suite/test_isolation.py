"""What a test switches on ends with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.isolation import integrations_off

ROOT = Path(__file__).parents[2]


def test_no_integration_stays_on() -> None:
    for name in ("bitsandbytes", "peft", "transformers"):
        pytest.importorskip(name)
    from transformers.quantizers import auto

    from qkern.integrations import bitsandbytes, peft, transformers

    theirs = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]

    def switch_all_on_and_fail() -> None:
        with integrations_off():
            peft.register()
            transformers.take_over_bitsandbytes()
            bitsandbytes.enable()
            assert auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is not theirs
            raise KeyError

    with pytest.raises(KeyError):
        switch_all_on_and_fail()
    assert not peft.registered()
    assert auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is theirs
    assert bitsandbytes.enabled_devices() == ()


def test_it_ends_with_every_test() -> None:
    """A test that loads a model registers with PEFT; the next one finds PEFT as it was."""
    pytest.importorskip("peft")
    tests = [
        "tests/integrations/test_transformers_load.py::test_the_logical_number_of_parameters_is_told",
        "tests/nn/test_parameters.py::test_peft_does_not_merge_into_the_codes",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
