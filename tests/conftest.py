"""Shared fixtures: the device and instruction set under test, poisoned outputs, fixed seeds."""

from __future__ import annotations

import json
import os
import platform
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# Before torch loads OpenMP: several test workers share the processor, and threads that spin while
# they wait would take it from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Outputs are poisoned where torch is to be deterministic; then it warns of a cuBLAS that is not.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from hypothesis import HealthCheck, settings

from qkern import testing
from qkern.backends import cpu
from tests.integrations import record
from tests.isolation import environment_kept, integrations_off
from tests.peers import mend_bitsandbytes
from tests.suite import shards

settings.register_profile(
    "qkern",
    derandomize=True,
    deadline=None,
    max_examples=200,
    database=None,
    # Fixtures here only choose a backend, which holds for all examples of a test.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile(
    "thorough", settings.get_profile("qkern"), derandomize=False, max_examples=2000
)
settings.load_profile(os.environ.get("QKERN_HYPOTHESIS_PROFILE", "qkern"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="device type whose backends the conformance tests run (default: cpu)",
    )
    parser.addoption(
        "--record-support",
        type=Path,
        help="write which op passed how many cases on which backend in which dtype to this file",
    )
    parser.addoption(
        "--record-features",
        type=Path,
        help="write what each feature did on qkern and on bitsandbytes to this file",
    )
    shards.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned: run without filling fresh tensors with NaN")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    if cpu.missing_reason() is None:
        # Workers of tests crowd the cores, and a caller whose threads come late would work alone.
        cpu.library().share_always(True)
    config.pluginmanager.register(shards.Shards(config), "shards")
    config.pluginmanager.register(record.Recorder(config), "features")


_passed: Counter[tuple[str, str, str]] = Counter()
"""Cases of the op table that passed, by op, target and dtype."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note which case of the op table a test runs, on which backend."""
    mend_bitsandbytes()
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if {"spec", "case"} <= params.keys() and ("on" in params or "schedule" in params):
        target = str(params["on"]) if "on" in params else "cuda_emulated"
        dtype = testing.DTYPE_NAMES[params["case"].dtype]
        item.user_properties.append(("support", [params["spec"].name, target, dtype]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _passed.update(tuple(value) for name, value in report.user_properties if name == "support")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--record-support")
    if path is None or hasattr(session.config, "workerinput"):
        return
    rows = [[*key, count] for key, count in sorted(_passed.items())]
    record = {"machine": platform.machine(), "torch": torch.__version__, "passed": rows}
    text = json.dumps(record, indent=1)
    path.write_text(
        text.replace(",\n   ", ", ").replace("[\n   ", "[").replace("\n  ]", "]") + "\n"
    )


def target_param(target: testing.Target) -> object:
    """A pytest parameter for a target, skipped with its reason where it cannot run."""
    marks = [pytest.mark.skip(reason=f"{target}: {target.reason}")] if target.reason else []
    return pytest.param(target, id=str(target), marks=marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`target`: every backend and instruction set of the device type; `isa`: the native CPU's."""
    device_type = metafunc.config.getoption("--device")
    if "target" in metafunc.fixturenames:
        found = testing.targets(device_type)
        metafunc.parametrize("target", [target_param(t) for t in found])
    if "isa" in metafunc.fixturenames:
        found = [t for t in testing.targets("cpu") if t.backend == "cpu"]
        metafunc.parametrize("isa", [target_param(t) for t in found], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set of the native CPU backend; gives its name."""
    with request.param.activate():
        yield request.param.isa


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that `--device` names."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _poisoned_outputs(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    with testing.poisoned_outputs():
        yield


@pytest.fixture(autouse=True)
def _fixed_state() -> Iterator[None]:
    """Same seeds, threads and environment for every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with environment_kept():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _integrations_off() -> Iterator[None]:
    with integrations_off():
        yield
