"""An Optuna storage whose critical sections hold across processes and hosts."""

from optuna_dlock.distributed_lock import DistributedLock
from optuna_dlock.duplicates import Duplicate
from optuna_dlock.errors import (
    AccessDeniedError,
    ClaimError,
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
from optuna_dlock.skipping import claim_or_skip, skip_duplicates
from optuna_dlock.storage import RedisLockedStorage
from optuna_dlock.twins import claim_finished, claim_params

__version__ = "0.1.0"

__all__ = [
    "RedisLockedStorage",
    "DistributedLock",
    "skip_duplicates",
    "claim_or_skip",
    "claim_params",
    "claim_finished",
    "Duplicate",
    "DLockError",
    "AccessDeniedError",
    "ClaimError",
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
