"""An Optuna storage whose critical sections hold across processes and hosts."""

__version__ = "0.1.0"
