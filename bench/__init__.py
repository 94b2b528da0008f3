"""Benchmarks: ours against the storages people use today, in one run, with the peers taking turns.

`python -m bench --help`, `python -m bench contention`, `pytest bench --benchmark-only`.
"""
