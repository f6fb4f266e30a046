"""Features, each tested by one function on qkern and on a peer, and what came of it.

``@feature("gradient checkpointing", group="Training")`` runs a test twice, with a `Side` for each
library. On qkern's side the test must pass. On the peer's it may fail: pytest then reports an
expected failure. Either way ``pytest --record-features FILE`` notes the outcome, and
``tools/features.py`` makes the tables of docs/frameworks.md of the notes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import features

QKERN, PEER = "qkern", "bitsandbytes"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes")
MARK = "feature"
LONGEST = 140
"""Characters of an error that the table shows."""


class Feature(NamedTuple):
    """A row of a table."""

    group: str
    name: str


REGISTERED: list[Feature] = []
"""Those of all test modules that were imported, in their order."""
REFUSED: set[Feature] = set()
"""Those of them that qkern refuses."""
REFUSALS = (ValueError, TypeError, NotImplementedError)
"""Errors by which something is refused."""


@dataclass(eq=False)
class Side:
    """A library that a test runs on, and how models are loaded with it."""

    name: str
    said: list[str] = field(default_factory=list)
    doing: str = ""
    """The stage of a long test, which the table says before an error."""

    @property
    def is_qkern(self) -> bool:
        """Whether it is qkern's."""
        return self.name == QKERN

    def note(self, text: str) -> None:
        """Say more than "yes" in the table: a figure, or what is different here."""
        self.said.append(text)

    def config(self, **options: Any) -> Any:
        """A quantisation config for `from_pretrained`: NF4, blocks of 64, double quantisation.

        ``options`` are `QKernConfig`'s; for bitsandbytes they are translated, and those that it
        does not have raise TypeError.
        """
        if self.is_qkern:
            from qkern.integrations.transformers import QKernConfig

            return QKernConfig(**options)
        from transformers import BitsAndBytesConfig

        names = {"format": "bnb_4bit_quant_type", "double_quant": "bnb_4bit_use_double_quant"}
        names |= {"compute_dtype": "bnb_4bit_compute_dtype", "skip": "llm_int8_skip_modules"}
        given = {"format": "nf4", "double_quant": True} | options
        for name in given:
            if name not in names:
                raise TypeError(f"BitsAndBytesConfig has nothing like {name}")
        return BitsAndBytesConfig(
            load_in_4bit=True, **{names[name]: value for name, value in given.items()}
        )

    def load(
        self, path: str | Path, *, auto: Any = None, options: Any = None, **kwargs: Any
    ) -> Any:
        """The dense model in a directory, quantised while it is loaded, in evaluation mode.

        ``auto`` is the class of transformers whose `from_pretrained` is called, by default
        `AutoModelForCausalLM`; ``options`` are `config`'s.
        """
        if auto is None:
            import transformers

            auto = transformers.AutoModelForCausalLM
        kwargs.setdefault("dtype", torch.float32)
        kwargs.setdefault("device_map", "cpu")
        config = self.config(**options or {})
        return auto.from_pretrained(path, quantization_config=config, **kwargs).eval()

    def reload(self, path: str | Path, *, auto: Any = None, **kwargs: Any) -> Any:
        """A model that was saved in 4 bits, in evaluation mode.

        A directory in bitsandbytes' format says so, so qkern has to be asked for.
        """
        if self.is_qkern:
            return self.load(path, auto=auto, **kwargs)
        if auto is None:
            import transformers

            auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(path, **{"device_map": "cpu"} | kwargs).eval()

    def registered(self) -> None:
        """Make PEFT know qkern's layers, on qkern's side."""
        if self.is_qkern:
            from qkern.integrations.peft import register

            register()

    def adapt(self, model: Any, config: Any = None, **options: Any) -> Any:
        """The model with an adapter of PEFT's, by default LoRA of rank 4 on all linear layers.

        ``config`` is PEFT's, else ``options`` are those of `LoraConfig`.
        """
        import peft

        self.registered()
        given = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
        return peft.get_peft_model(model, config or peft.LoraConfig(**given))

    @property
    def linear(self) -> type[torch.nn.Module]:
        """The class of its 4-bit layers."""
        if self.is_qkern:
            from qkern.nn import Linear4bit
        else:
            from bitsandbytes.nn import Linear4bit
        return Linear4bit


def feature(name: str, *, group: str, slow: bool = False) -> Callable[[Any], Any]:
    """Make a test of ``side: Side`` and other fixtures a row of a table; see the module's text."""
    return cases(group=group, names={name: ()}, slow=() if not slow else (name,))


def cases(
    *,
    group: str,
    names: Mapping[str, object],
    argument: str | None = None,
    slow: tuple[str, ...] = (),
    refused: bool = False,
) -> Callable[[Any], Any]:
    """Several rows by one test: ``names`` has each row's name and the value of ``argument``.

    What is ``refused`` has to raise one of `REFUSALS` on qkern's side.
    """
    rows = [Feature(group, name) for name in names]
    repeated = [row for row in rows if row in REGISTERED]
    if repeated:
        raise ValueError(f"names: {repeated[0]} is registered already")
    REGISTERED.extend(rows)
    REFUSED.update(rows if refused else ())
    values = []
    for row, value in zip(rows, names.values(), strict=True):
        for side in (QKERN, PEER):
            marks = [getattr(pytest.mark, MARK)(*row, side, refused=refused)]
            marks += [pytest.mark.slow] if row.name in slow else []
            given = (side, value) if argument else (side,)
            label = side if len(rows) == 1 and not argument else f"{row.name}-{side}"
            values.append(pytest.param(*given, id=re.sub(r"\W+", "_", label), marks=marks))
    arguments = ["side", argument] if argument else ["side"]
    return pytest.mark.parametrize(arguments, values, indirect=["side"])


def first_line(error: BaseException) -> str:
    """What a table says of an error: an assertion's message, or the class and its first line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    # Paths, addresses and test modules' text differ from run to run.
    line = re.sub(r"(?<![\w.])/[\w./-]+", "...", line)
    line = re.sub(r"0x[0-9a-f]+", "0x...", line)
    line = line if len(line) <= LONGEST else line[: LONGEST - 4].rstrip() + " ..."
    if isinstance(error, AssertionError):
        return line
    kind = type(error).__name__
    return f"{kind}: {line}" if line else kind


class Recorder:
    """A plugin of pytest: judges both sides, and writes the file of ``--record-features``."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path | None = config.getoption("--record-features")
        self.rows: dict[tuple[str, str, str], features.Outcome] = {}
        config.addinivalue_line(
            "markers", f"{MARK}(group, name, side, refused): a row of a table in docs/frameworks.md"
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note the outcome; a failure on the peer's side was to be expected."""
        report = yield
        mark = item.get_closest_marker(MARK)
        if mark is None or report.when != "call" or report.skipped:
            return report
        side = item.funcargs["side"]
        works = call.excinfo is None
        text = ". ".join(side.said)
        if not works:
            text = first_line(call.excinfo.value)
            text = f"{side.doing}: {text}" if side.doing else text
        refused = side.is_qkern and mark.kwargs["refused"]
        if not works and side.name == PEER:
            report.outcome, report.wasxfail = "skipped", f"{PEER}: {text}"
        elif refused and works:
            report.outcome, report.longrepr = "failed", "it is not refused any more"
        elif refused and isinstance(call.excinfo.value, REFUSALS):
            report.outcome, report.longrepr = "passed", None
        if report.outcome == "passed" or side.name == PEER:
            item.user_properties.append((MARK, [*mark.args, works, text]))
            report.user_properties = list(item.user_properties)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather what the workers send."""
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == MARK:
                group, feature_name, side, works, text = value
                self.rows[group, feature_name, side] = features.Outcome(works, text)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the file; what ran before on the same versions stays."""
        if self.path is None or hasattr(session.config, "workerinput"):
            return
        versions = {name: version(name).partition("+")[0] for name in LIBRARIES}
        before = features.read(self.path) if self.path.exists() else None
        rows = {**before.rows, **self.rows} if before and before.versions == versions else self.rows
        features.write(self.path, features.Record(versions, rows))
