"""An Optuna storage whose critical sections hold across processes and hosts."""

from optuna_dlock.budget import TrialBudget
from optuna_dlock.distributed_lock import DistributedLock
from optuna_dlock.duplicates import Duplicate
from optuna_dlock.errors import (
    AccessDeniedError,
    BudgetExhaustedError,
    BudgetMismatchError,
    ClaimError,
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
    TrialTakenError,
    UnsupportedStorageError,
)
from optuna_dlock.graceful_stop import graceful_stop
from optuna_dlock.grid_sampler import ClusterGridSampler
from optuna_dlock.samplers import cluster_sampler
from optuna_dlock.skipping import claim_or_skip, skip_duplicates
from optuna_dlock.step_range import step_range
from optuna_dlock.storage import RedisLockedStorage
from optuna_dlock.twins import claim_finished, claim_params
from optuna_dlock.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "RedisLockedStorage",
    "TrialBudget",
    "cluster_sampler",
    "ClusterGridSampler",
    "DistributedLock",
    "skip_duplicates",
    "claim_or_skip",
    "claim_params",
    "claim_finished",
    "Duplicate",
    "Worker",
    "graceful_stop",
    "step_range",
    "DLockError",
    "AccessDeniedError",
    "ClaimError",
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
    "TrialTakenError",
]
