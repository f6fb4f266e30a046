"""What a test switches on ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.isolation import environment_kept, integrations_off

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


def test_the_environment_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERN_ONE", "1")
    monkeypatch.setenv("QKERN_TWO", "2")
    monkeypatch.delenv("QKERN_THREE", raising=False)
    before = dict(os.environ)
    with environment_kept():
        os.environ["QKERN_ONE"] = "another"
        del os.environ["QKERN_TWO"]
        os.environ["QKERN_THREE"] = "new"
    assert dict(os.environ) == before


_RUN = """
import os, sys, pytest
before = os.environ.get("CXX")
status = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]])
assert os.environ.get("CXX") == before, os.environ["CXX"]
sys.exit(status)
"""


def test_they_end_with_every_test() -> None:
    """Loading a model registers with PEFT, and BOFT sets ``CXX``; nothing later finds either."""
    pytest.importorskip("peft")
    tests = [
        "tests/integrations/test_peft_tuners.py::"
        "test_other_tuners_train_as_on_the_dense_model[BOFTConfig]",
        "tests/integrations/test_transformers_load.py::test_the_logical_number_of_parameters_is_told",
        "tests/nn/test_parameters.py::test_peft_does_not_merge_into_the_codes",
    ]
    command = [sys.executable, "-c", _RUN, *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
