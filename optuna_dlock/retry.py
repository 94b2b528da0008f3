"""How long to go on trying, and how long to wait in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable


class Backoff:
    """Jittered exponential waits within a time limit.

    Full jitter after Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015).

    Args:
        timeout: Seconds after which `wait` says that it is enough.
        first: Upper bound of the first wait, in seconds; doubled at each further one.
        longest: Upper bound of any wait, in seconds.
        clock: Monotonic clock, in seconds.
        sleep: Called with the seconds to wait.
    """

    def __init__(
        self,
        timeout: float,
        first: float = 0.01,
        longest: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._deadline = clock() + timeout
        self._bound = first
        self._longest = longest

    def wait(self) -> bool:
        """Sleep for a while and return True, or return False at once if the time is over."""
        left = self._deadline - self._clock()
        if left <= 0:
            return False
        self._sleep(min(left, random.uniform(self._bound / 2, self._bound)))
        self._bound = min(self._bound * 2, self._longest)
        return True
