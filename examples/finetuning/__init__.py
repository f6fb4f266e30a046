"""The parts of ``examples/finetune.py``: data, checkpoints, training and the report."""


class UserError(Exception):
    """A mistake in what the user gave: shown as one line, without a traceback."""
