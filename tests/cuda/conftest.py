"""What tests of the CUDA kernels on the emulator share."""

from __future__ import annotations

from types import ModuleType

import pytest

from lab.cuda.emulator import build


@pytest.fixture(scope="session")
def library() -> ModuleType:
    """The module of the plain build."""
    if build.compiler() is None:
        pytest.skip("the emulator needs g++ or CXX")
    return build.load(build.build("plain"))
