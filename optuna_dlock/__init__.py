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
    TrialTakenError,
)
from optuna_dlock.storage import RedisLockedStorage
from optuna_dlock.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "RedisLockedStorage",
    "DistributedLock",
    "Worker",
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
    "TrialTakenError",
]
