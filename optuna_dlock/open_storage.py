"""Open any Optuna storage for reading, by its URL: nothing is created, and no password is shown."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import redis
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend, JournalStorage

from optuna_dlock.errors import DLockError, InvalidURLError, StorageUnavailableError
from optuna_dlock.keys import DEFAULT_PREFIX, RegistryKeys
from optuna_dlock.server import Server, server_of_url
from optuna_dlock.storage import RedisLockedStorage

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

# What SQLAlchemy calls them; a driver may follow after a "+".
_DATABASES = ("sqlite", "mysql", "mariadb", "postgresql", "mssql", "oracle")
_TABLES = ("studies", "trials", "version_info", "alembic_version")
FORMS = (
    "a URL of redis://, valkey://, keydb://, unix://, embedded:, sqlite://, mysql://, postgresql://, "
    "journal:PATH or journal+redis://, or the path of a journal or SQLite file"
)


def open_storage(url: str, timeout: float) -> tuple[str, BaseStorage]:
    """Open the storage behind a URL, of whatever kind.

    An embedded server that is not running is started, on the data that its folder holds.

    Args:
        url: See `FORMS`.
        timeout: Seconds to wait for a server of `RedisLockedStorage`.

    Returns:
        Its name for people, without user and password; the storage.

    Raises:
        InvalidURLError: If nobody understands the URL, or it names a file or folder that is not there.
        StorageUnavailableError: If it does not answer.
        DLockError: If it is no Optuna storage, or its driver is not installed.
    """
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower()
    if scheme == "journal" and colon:
        return _open_journal_file(rest)
    if scheme in ("journal+redis", "journal+rediss", "journal+unix"):
        return _open_journal_redis(url, url[len("journal+") :])
    if scheme.partition("+")[0] in _DATABASES and colon:
        return _open_database(url)
    if os.path.isfile(url):
        with open(url, "rb") as file:
            is_sqlite = file.read(16) == b"SQLite format 3\0"
        return _open_database(f"sqlite:///{url}") if is_sqlite else _open_journal_file(url)
    return _open_ours(url, timeout)


def unavailable(database: str, error: Exception) -> DLockError:
    """The error of a storage that is not ours, in one line."""
    text = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    return StorageUnavailableError(f"cannot read {database}: {text}", address=database, timeout=0.0)


def _open_ours(url: str, timeout: float) -> tuple[str, BaseStorage]:
    try:
        server = server_of_url(url, None)
    except InvalidURLError as error:
        if ":" in url:
            raise
        raise InvalidURLError(f"there is no file {url!r}; a storage is {FORMS}", url=url) from error
    if server.embedded_path is not None and not os.path.exists(server.embedded_path):
        # Opening it would create it.
        raise InvalidURLError(f"there is no embedded storage at {server.embedded_path}", url=url)
    name = server.address + (f"?prefix={server.prefix}" if server.prefix != DEFAULT_PREFIX else "")
    if server.masters and not _anybody_worked_on(server, timeout):
        # Opening several masters makes them known to each other, for ever.
        raise DLockError(f"there are no studies on {name}: nobody has worked there yet")
    return name, RedisLockedStorage(url, timeout=timeout)


def _anybody_worked_on(server: Server, timeout: float) -> bool:
    """Whether a master knows that it is one of several, or none can be asked: the storage says why not."""
    answers = []
    for master in server.masters:
        with redis.Redis.from_url(
            str(master.redis_url), socket_connect_timeout=timeout, socket_timeout=timeout
        ) as client:
            try:
                answers.append(bool(client.exists(RegistryKeys(server.prefix).members)))
            except redis.RedisError:
                continue
    return any(answers) or not answers


def _open_journal_file(path: str) -> tuple[str, BaseStorage]:
    if not os.path.isfile(path):
        raise InvalidURLError(f"there is no journal file {path!r}", url=path)
    return path, _read(path, lambda: JournalStorage(JournalFileBackend(path)))


def _open_journal_redis(url: str, redis_url: str) -> tuple[str, BaseStorage]:
    parts = urlsplit(url)
    name = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    try:
        with redis.Redis.from_url(redis_url, socket_connect_timeout=3) as client:
            found = client.exists(":log_number")
    except (redis.RedisError, ValueError) as error:
        raise unavailable(name, error) from error
    if not found:
        raise DLockError(f"there is no journal of Optuna on {name}")
    return name, _read(name, lambda: JournalStorage(JournalRedisBackend(redis_url)))


def _open_database(url: str) -> tuple[str, BaseStorage]:
    import sqlalchemy  # slow to import, and only needed here

    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise InvalidURLError("cannot understand the URL of the database", url=None) from None
    name = parsed.set(username=None, password=None, query={}).render_as_string()
    if parsed.get_backend_name() == "sqlite":
        parsed = _read_only(parsed)
    try:
        engine = sqlalchemy.create_engine(parsed)
        tables = sqlalchemy.inspect(engine).get_table_names()
        engine.dispose()
    except ImportError as error:
        raise DLockError(f"{name} needs a driver that is not installed: {error}") from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise unavailable(name, error) from error
    if not set(_TABLES) <= set(tables):
        # RDBStorage would create them.
        raise DLockError(f"there are no studies of Optuna in {name}")
    readable = parsed.render_as_string(hide_password=False)
    return name, _read(name, lambda: get_storage(RDBStorage(readable, skip_table_creation=True)))


def _read_only(url: URL) -> URL:
    """The URL of the same SQLite file, opened so that nothing can be written."""
    path = url.database
    if not path or not os.path.isfile(path):
        raise InvalidURLError(f"there is no SQLite file {path!r}", url=None)
    return url.set(database=f"file:{quote(os.path.abspath(path))}", query={"mode": "ro", "uri": "true"})


def _read(name: str, open_: Callable[[], BaseStorage]) -> BaseStorage:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # whoever made the storage has seen it
            return open_()
    except Exception as error:
        raise unavailable(name, error) from error
