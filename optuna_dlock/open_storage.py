"""Open any Optuna storage for reading, by its URL: nothing is created, and no password is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import redis
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend, JournalStorage

from optuna_dlock.errors import DLockError, InvalidURLError, StorageUnavailableError
from optuna_dlock.keys import DEFAULT_PREFIX
from optuna_dlock.storage import RedisLockedStorage
from optuna_dlock.url import parse_url, split_url

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
        locations = [parse_url(one) for one in split_url(url)]
    except InvalidURLError as error:
        if ":" in url:
            raise
        raise InvalidURLError(f"there is no file {url!r}; a storage is {FORMS}", url=url) from error
    folder = locations[0].embedded_path
    if folder is not None and not os.path.exists(folder):
        # Opening it would create it.
        raise InvalidURLError(f"there is no embedded storage at {folder}", url=url)
    name = ",".join(location.address for location in locations)
    if locations[0].prefix != DEFAULT_PREFIX:
        name += f"?prefix={locations[0].prefix}"
    return name, RedisLockedStorage(url, timeout=timeout)


def _open_journal_file(path: str) -> tuple[str, BaseStorage]:
    if not os.path.isfile(path):
        raise InvalidURLError(f"there is no journal file {path!r}", url=path)
    return path, _read(path, lambda: JournalStorage(JournalFileBackend(path)))


def _open_journal_redis(url: str, redis_url: str) -> tuple[str, BaseStorage]:
    name = url if urlsplit(url).netloc == "" else urlsplit(url)._replace(query="").geturl()
    name = name.replace(urlsplit(url).netloc, urlsplit(url).netloc.rpartition("@")[2], 1)
    try:
        found = redis.Redis.from_url(redis_url, socket_connect_timeout=3).exists(":log_number")
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
        return open_()
    except Exception as error:
        raise unavailable(name, error) from error
