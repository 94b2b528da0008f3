"""Tests of optuna_dlock, against real servers of their own."""
