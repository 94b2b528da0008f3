"""What the commands of `optuna-dlock` share: opening a storage to look at it, tables, JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from optuna_dlock.errors import InvalidURLError
from optuna_dlock.storage import RedisLockedStorage
from optuna_dlock.url import parse_url, split_url

OK, FAILED, USAGE = 0, 1, 2
# A tool that somebody waits for gives up sooner than a worker does.
TIMEOUT = 3.0
URL_HELP = (
    "redis://host:6379/0, rediss://…, valkey://…, keydb://…, unix:///path/to.sock or embedded:PATH; "
    "several masters: keydb://h1:6379,h2:6379,h3:6379/0"
)

# name, purpose, examples, what to run: the parser of that command
AddCommand = Callable[[str, str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]


def open_to_look(url: str) -> RedisLockedStorage:
    """The storage behind a URL, if there is one: opening an embedded one would create it.

    Raises:
        InvalidURLError: If there is no embedded storage at that path.
    """
    for one in split_url(url):
        folder = parse_url(one).embedded_path
        if folder is not None and not os.path.exists(folder):
            raise InvalidURLError(f"there is no embedded storage at {folder}", url=url)
    return RedisLockedStorage(url, timeout=TIMEOUT)


def table(rows: Sequence[Sequence[object]], left: Sequence[int]) -> str:
    """Rows, of which the first one is the heading, in columns.

    Args:
        left: Columns that are aligned on the left; the others are numbers.
    """
    cells = [[_printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _printable(cell: str) -> str:
    """A cell that cannot drive the terminal: names are whatever their users chose."""
    return cell if cell.isprintable() else repr(cell)


def to_json(found: Any) -> str:
    """JSON that every reader takes: infinities and NaN, which it lacks, become text."""
    return json.dumps(_finite(found), ensure_ascii=False, indent=2, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def duration(seconds: float | None) -> str:
    """Seconds for people: 0.42 s, 95.1 s, 2 h 05 min."""
    if seconds is None:
        return ""
    if seconds < 600:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
