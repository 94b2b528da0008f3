"""Errors: one tree, with fields, that survives pickling and doubles as what the contract asks for."""

from __future__ import annotations

import inspect
import pickle

import optuna.exceptions
import pytest

from optuna_dlock import errors
from optuna_dlock.errors import DLockError

ALL = [member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, DLockError)]
FINISHED = getattr(optuna.exceptions, "UpdateFinishedTrialError", RuntimeError)  # since Optuna 4.3


@pytest.mark.parametrize("kind", ALL)
def test_an_error_pickles_with_its_message_and_fields(kind: type[DLockError]) -> None:
    error = kind("what happened", address="m8:6379", timeout=2.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "what happened"  # a bare KeyError would show quotes
    assert {"address": "m8:6379", "timeout": 2.5}.items() <= vars(copy).items()


@pytest.mark.parametrize(
    ("kind", "doubles_as"),
    [
        (errors.StudyNotFoundError, KeyError),
        (errors.TrialNotFoundError, KeyError),
        (errors.StudyExistsError, optuna.exceptions.DuplicatedStudyError),
        (errors.FinishedTrialError, FINISHED),
        (errors.FinishedTrialError, RuntimeError),
        (errors.IncompatibleDistributionError, ValueError),
        (errors.NotSerializableError, TypeError),
        (errors.InvalidURLError, ValueError),
        (errors.CorruptRecordError, ValueError),
        (errors.StorageUnavailableError, ConnectionError),
        (errors.AccessDeniedError, PermissionError),
        (errors.LockNotAcquiredError, TimeoutError),
        (errors.LockNotAcquiredError, errors.LockError),
        (errors.LockLostError, errors.LockError),
    ],
)
def test_an_error_doubles_as_the_type_that_callers_expect(
    kind: type[DLockError], doubles_as: type[Exception]
) -> None:
    assert issubclass(kind, doubles_as)


def test_all_errors_are_one_tree() -> None:
    defined = [
        member
        for _, member in inspect.getmembers(errors, inspect.isclass)
        if member.__module__ == errors.__name__
    ]
    assert all(issubclass(member, DLockError) for member in defined)
    assert len(defined) == len(ALL) >= 16
