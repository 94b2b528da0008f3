"""Many schedules of the real code of several masters and their clients, each decided by a seed.

`python -m tests.simulation SEED` runs one and prints what happened.
"""
