"""An Optuna storage whose critical sections hold across processes and hosts."""

from optuna_dlock.budget import TrialBudget
from optuna_dlock.distributed_lock import DistributedLock
from optuna_dlock.errors import (
    AccessDeniedError,
    BudgetExhaustedError,
    BudgetMismatchError,
    CorruptRecordError,
    DataLostError,
    DLockError,
    FinishedTrialError,
    GridMismatchError,
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
    StudyStoppedError,
    TrialNotFoundError,
    UnsupportedStorageError,
)
from optuna_dlock.grid_sampler import ClusterGridSampler
from optuna_dlock.storage import RedisLockedStorage

__version__ = "0.1.0"

__all__ = [
    "RedisLockedStorage",
    "TrialBudget",
    "ClusterGridSampler",
    "DistributedLock",
    "DLockError",
    "AccessDeniedError",
    "BudgetExhaustedError",
    "BudgetMismatchError",
    "CorruptRecordError",
    "DataLostError",
    "FinishedTrialError",
    "GridMismatchError",
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
    "StudyStoppedError",
    "TrialNotFoundError",
    "UnsupportedStorageError",
]
