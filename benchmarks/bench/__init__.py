"""The parts of ``benchmarks/run.py``: probes, contests, timing, tables and plots."""
