"""Where reports come from: any Optuna storage, opened for reading, and its studies as they change."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Container, Iterator, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

from optuna_dlock.errors import DLockError, StudyNotFoundError
from optuna_dlock.open_storage import open_storage, unavailable
from optuna_dlock.report import WINDOW, StudyReport, StudyStatistics, Worker
from optuna_dlock.storage import RedisLockedStorage


class ReportSource:
    """The studies of a storage; each `refresh` reads what changed since the last one.

    It creates nothing: a file, folder or table that is not there is an error.

    Args:
        url: A URL of `RedisLockedStorage`, or one of SQLAlchemy (`sqlite:///file.db`, `mysql://…`,
            `postgresql://…`), the path of a journal file or `journal:PATH`, or `journal+redis://host:6379/0`.
        pattern: Which studies: a shell pattern such as "P2c_*"; None for all.
        timeout: Seconds to wait for a server of ours.
        window: Seconds of the recent throughput.

    Attributes:
        database: The URL as it may be shown: no user, no password.
        window: Seconds of the recent throughput.
        statistics: The studies by id, newest first, as of the last refresh.

    Raises:
        DLockError: If there is no such storage, or it does not answer.
    """

    def __init__(
        self, url: str, pattern: str | None = None, *, timeout: float = 60.0, window: float = WINDOW
    ) -> None:
        self._pattern = pattern
        self.window = window
        self.statistics: dict[int, StudyStatistics] = {}
        self.database, self._storage = open_storage(url, timeout)

    def refresh(self, now: datetime | None = None) -> list[StudyReport]:
        """The studies, newest first, as they are now.

        Raises:
            StudyNotFoundError: If there are studies, but none has a name that matches.
        """
        with _without_collector():
            return self._refresh(datetime.now() if now is None else now)

    def _refresh(self, now: datetime) -> list[StudyReport]:
        studies = sorted(
            ((study._study_id, study) for study in self._call(self._storage.get_all_studies)),
            key=lambda entry: entry[0],
        )
        wanted = [
            (number, study_id, study)
            for number, (study_id, study) in enumerate(studies)
            if self._pattern is None or fnmatchcase(study.study_name, self._pattern)
        ]
        if studies and not wanted:
            names = [study.study_name for _, study in studies[-5:]]
            more = f" and {len(studies) - 5} more" if len(studies) > 5 else ""
            raise StudyNotFoundError(
                f"no study of {self.database} matches {self._pattern!r}; there are {', '.join(names)}{more}"
            )
        found: dict[int, StudyStatistics] = {}
        for number, study_id, study in reversed(wanted):
            statistics = self.statistics.get(study_id) or StudyStatistics(
                number, study.study_name, study.directions
            )
            statistics.number = number
            try:
                self._update(statistics, study_id)
            except KeyError:
                continue  # deleted in between
            found[study_id] = statistics
        self.statistics = found
        return [statistics.report(now, self.window) for statistics in self.statistics.values()]

    def _update(self, statistics: StudyStatistics, study_id: int) -> None:
        storage = self._storage
        trials = self._call(lambda: storage.get_all_trials(study_id, deepcopy=False))
        # Storages other than ours know neither.
        get_workers: Callable[[int, int], Mapping[int, Worker]] | None = getattr(
            storage, "get_trial_workers", None
        )
        get_duplicates: Callable[[int], Container[int]] | None = getattr(storage, "get_duplicates", None)
        workers = self._call(lambda: get_workers(study_id, statistics.first_open)) if get_workers else {}
        duplicates = self._call(lambda: get_duplicates(study_id)) if get_duplicates else ()
        statistics.update(trials, workers, duplicates)

    def _call(self, read: Callable[[], Any]) -> Any:
        """Run a read; an error of a foreign storage becomes one line."""
        try:
            return read()
        except (DLockError, KeyError):
            raise
        except Exception as error:
            raise unavailable(self.database, error) from error

    def close(self) -> None:
        """Close the connections."""
        if isinstance(self._storage, RedisLockedStorage):
            self._storage.close()
        else:
            self._storage.remove_session()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """All that is read is kept: to look for garbage in it again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
