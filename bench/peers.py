"""The storages that take turns: how each one is opened, and how what it left is removed."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import optuna
import redis
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend

OURS = "ours"
INMEMORY = "InMemory"
JOURNAL_REDIS = "JournalRedis"
JOURNAL_FILE = "JournalFile"
SQLITE = "SQLite"
POSTGRES = "PostgreSQL"
MYSQL = "MariaDB"
UNPICKLING = "unpickling"  # no storage: the floor of a cold load

PEERS = (OURS, INMEMORY, JOURNAL_REDIS, JOURNAL_FILE, SQLITE, POSTGRES, MYSQL, UNPICKLING)
ON_REDIS = (OURS, JOURNAL_REDIS)
SLOW = (SQLITE, POSTGRES, MYSQL)  # they get fewer trials, or a run would take an hour


@dataclass(frozen=True)
class Access:
    """Where the servers and the files of this run are."""

    redis_url: str
    folder: str
    postgres_url: str | None = None
    mysql_url: str | None = None


def open_storage(peer: str, access: Access, namespace: str) -> BaseStorage:
    """A new storage object on a name space of its own.

    Args:
        peer: One of `PEERS`.
        access: Where the servers are.
        namespace: Key prefix, file name, schema or database.
    """
    if peer == OURS:
        return _ours(access.redis_url, namespace)
    if peer == INMEMORY:
        return InMemoryStorage()
    if peer == JOURNAL_REDIS:
        return JournalStorage(JournalRedisBackend(access.redis_url, prefix=namespace))
    if peer == JOURNAL_FILE:
        return JournalStorage(JournalFileBackend(str(_file(access, namespace, "log"))))
    return optuna.storages.get_storage(_rdb(peer, access, namespace))


def _ours(url: str, namespace: str) -> BaseStorage:
    from optuna_dlock import RedisLockedStorage

    return RedisLockedStorage(f"{url}{'&' if '?' in url else '?'}prefix={namespace}")


def _file(access: Access, namespace: str, suffix: str) -> Path:
    return Path(access.folder) / f"{namespace}.{suffix}"


def _rdb(peer: str, access: Access, namespace: str) -> RDBStorage:
    if peer == SQLITE:
        url = f"sqlite:///{_file(access, namespace, 'db')}"
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 120}})
    import sqlalchemy

    server = sqlalchemy.make_url(_sql_url(peer, access))
    if peer == MYSQL:
        server = server.set(database=namespace)
    else:
        server = server.update_query_dict({"options": f"-csearch_path={namespace}"})
    return RDBStorage(server.render_as_string(hide_password=False))


def _sql_url(peer: str, access: Access) -> str:
    url = access.postgres_url if peer == POSTGRES else access.mysql_url
    if url is None:
        raise ValueError(f"no URL of a {peer} server")
    scheme, separator, rest = url.partition("://")
    driver = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mysql+pymysql"}
    return driver.get(scheme, scheme) + separator + rest


def create_namespace(peer: str, access: Access, namespace: str) -> None:
    """Make the schema or database of a name space; nothing to do for the others."""
    if peer in (POSTGRES, MYSQL):
        kind = "SCHEMA" if peer == POSTGRES else "DATABASE"
        _execute(peer, access, f"CREATE {kind} IF NOT EXISTS {namespace}")


def remove_namespace(peer: str, access: Access, namespace: str) -> None:
    """Remove all that was stored under a name space."""
    if peer in ON_REDIS:
        remove_keys(access.redis_url, namespace)
    elif peer in (JOURNAL_FILE, SQLITE):
        for path in Path(access.folder).glob(f"{namespace}.*"):
            with contextlib.suppress(IsADirectoryError):
                path.unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
    elif peer == POSTGRES:
        _execute(peer, access, f"DROP SCHEMA IF EXISTS {namespace} CASCADE")
    elif peer == MYSQL:
        _execute(peer, access, f"DROP DATABASE IF EXISTS {namespace}")


def remove_keys(redis_url: str, prefix: str) -> None:
    """Delete `prefix:*`, at once, so that the next measurement meets an idle server."""
    with redis.Redis.from_url(redis_url) as client:
        keys: list[bytes] = []
        for key in client.scan_iter(match=f"{prefix}:*", count=5000):
            keys.append(key)
            if len(keys) == 5000:
                client.delete(*keys)
                keys.clear()
        if keys:
            client.delete(*keys)


def _execute(peer: str, access: Access, statement: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(_sql_url(peer, access))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement))
    engine.dispose()
