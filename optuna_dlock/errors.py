"""Every error this package raises: one small tree under `DLockError`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optuna.exceptions as optuna_exceptions

if TYPE_CHECKING:
    from optuna.exceptions import UpdateFinishedTrialError as UpdateFinishedTrialError
else:
    # Optuna has this class since 4.3; before, the contract was a bare RuntimeError.
    UpdateFinishedTrialError = getattr(optuna_exceptions, "UpdateFinishedTrialError", RuntimeError)


class DLockError(Exception):
    """Base of all errors of this package.

    Keyword arguments become attributes, and the whole error survives pickling.
    """

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self._fields = fields
        self.__dict__.update(fields)

    def __str__(self) -> str:  # KeyError would show the repr of its message
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self._fields)


def _rebuild(cls: type[DLockError], message: str, fields: dict[str, Any]) -> DLockError:
    return cls(message, **fields)


class InvalidURLError(DLockError, ValueError):
    """A storage URL that cannot be understood. Field: `url` (without password)."""

    url: str | None


class StorageUnavailableError(DLockError, ConnectionError):
    """The server did not answer for `timeout` seconds. Fields: `address`, `timeout`."""

    address: str
    timeout: float


class QuorumError(StorageUnavailableError):
    """No majority of several masters answered for `timeout` seconds.

    Fields: `needed` and `answered` (numbers of masters), `nodes` (address -> what is wrong there), `address`,
    `timeout`.
    """

    needed: int
    answered: int
    nodes: dict[str, str]


class AccessDeniedError(DLockError, PermissionError):
    """Wrong password, or a user that may not run a needed command. Field: `address`."""

    address: str


class ServerConfigurationError(DLockError):
    """A server this package must not work on (it evicts keys, its memory is full). Field: `address`."""

    address: str


class MembershipError(ServerConfigurationError):
    """A master belongs to another list of masters than the one given. Fields: `address`, `members`."""

    members: list[str]


class DataLostError(DLockError):
    """The server lost acknowledged data, e.g. it restarted without persistence. Field: `address`."""

    address: str


class CorruptRecordError(DLockError, ValueError):
    """Something unreadable or foreign stands under one of our keys. Field: `key`."""

    key: str


class StudyNotFoundError(DLockError, KeyError):
    """No such study."""


class TrialNotFoundError(DLockError, KeyError):
    """No such trial."""


class StudyExistsError(DLockError, optuna_exceptions.DuplicatedStudyError):
    """A study of this name exists. Field: `study_name`."""

    study_name: str


class FinishedTrialError(DLockError, UpdateFinishedTrialError):
    """A finished trial was to be changed. Field: `trial_id`."""

    trial_id: int


class TrialTakenError(FinishedTrialError):
    """Another worker took this trial over, and runs it now or put it in the queue. Field: `trial_id`.

    For whoever ran it, it is as if it had finished: nothing that is written to it counts any more.
    """


class IncompatibleDistributionError(DLockError, ValueError):
    """A parameter has another kind of distribution in this study. Field: `param_name`."""

    param_name: str


class NotSerializableError(DLockError, TypeError):
    """An attribute that JSON cannot express. Field: `key`."""

    key: str


class LockError(DLockError):
    """Base of the errors of `storage.lock(...)`. Field: `name`."""

    name: str


class LockNotAcquiredError(LockError, TimeoutError):
    """The lock was not acquired in time. Fields: `name`, `timeout`, `holder`, `held_for` (seconds)."""

    timeout: float | None
    holder: str | None
    held_for: float | None


class LockLostError(LockError):
    """The lock's lease ran out before it was renewed or released. Fields: `name`, `token`."""

    token: int
