"""An Optuna storage whose critical sections hold across processes and hosts."""

from optuna_dlock.distributed_lock import DistributedLock
from optuna_dlock.errors import (
    AccessDeniedError,
    CorruptRecordError,
    DataLostError,
    DLockError,
    FinishedTrialError,
    IncompatibleDistributionError,
    InvalidURLError,
    LockError,
    LockLostError,
    LockNotAcquiredError,
    NotSerializableError,
    ServerConfigurationError,
    StorageUnavailableError,
    StudyExistsError,
    StudyNotFoundError,
    TrialNotFoundError,
)
from optuna_dlock.graceful_stop import graceful_stop
from optuna_dlock.step_range import step_range
from optuna_dlock.storage import RedisLockedStorage

__version__ = "0.1.0"

__all__ = [
    "RedisLockedStorage",
    "DistributedLock",
    "graceful_stop",
    "step_range",
    "DLockError",
    "AccessDeniedError",
    "CorruptRecordError",
    "DataLostError",
    "FinishedTrialError",
    "IncompatibleDistributionError",
    "InvalidURLError",
    "LockError",
    "LockLostError",
    "LockNotAcquiredError",
    "NotSerializableError",
    "ServerConfigurationError",
    "StorageUnavailableError",
    "StudyExistsError",
    "StudyNotFoundError",
    "TrialNotFoundError",
]
