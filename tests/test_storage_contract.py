"""Optuna's own storage test case, on every kind of server and in front of a proxy."""

from __future__ import annotations

import pytest
from optuna.testing.pytest_storages import StorageTestCase

from optuna_dlock import RedisLockedStorage


class TestOnServer(StorageTestCase):
    """Every server flavour that is installed."""

    @pytest.fixture
    def storage(self, url: str) -> RedisLockedStorage:
        return RedisLockedStorage(url)
