"""The thread that keeps alive the trials which this process runs, in `optimize` or by ask and tell."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping

from optuna_dlock.ensemble import AnyNode
from optuna_dlock.runners import Runners
from optuna_dlock.scripts import script

_logger = logging.getLogger(__name__)


class Heartbeats:
    """Sends one heartbeat per study and interval, for all trials that this process runs there.

    It has a connection of its own, as a call that waits for a lock or for the server holds the other one. The
    thread starts with the first trial and ends once none runs. Whatever goes wrong is logged and tried again.

    Args:
        interval: Seconds between two heartbeats.
        studies: The trials of each study that this process works on.
        make_node: Gives the connection.
    """

    def __init__(
        self, interval: float, studies: Mapping[int, Runners], make_node: Callable[[], AnyNode]
    ) -> None:
        self.interval = interval
        self._studies = studies
        self._make_node = make_node
        self._node: AnyNode | None = None
        self._guard = threading.Lock()
        self._stop: threading.Event | None = None  # of the thread, if there is one
        self._woken = False

    def wake(self) -> None:
        """A trial was created or claimed: see that there is a thread."""
        self._woken = True
        if self._stop is None:
            self._start()

    def _start(self) -> None:
        with self._guard:
            if self._stop is not None:
                return
            self._stop = threading.Event()
            # The thread must not keep alive what everybody else forgot.
            weakref.finalize(self, self._stop.set).atexit = False
            threading.Thread(
                target=_beat_for_ever,
                args=(weakref.ref(self), self._stop, self.interval),
                name="optuna-dlock-heartbeats",
                daemon=True,
            ).start()

    def stop(self) -> None:
        """End the thread, and close its connection; the next trial starts another."""
        with self._guard:
            stop, self._stop = self._stop, None
            node, self._node = self._node, None
        if stop is not None:
            stop.set()
        if node is not None:
            with node.lock:
                node.close()

    def beat(self, stop: threading.Event) -> bool:
        """Send one heartbeat; whether the thread that asks is to go on."""
        self._woken = False
        try:
            runs = self._send()
        except Exception as error:  # whatever it is: the trials live by this thread
            _logger.warning("heartbeats were not recorded for now: %s", error)
            runs = True
        with self._guard:
            if self._stop is not stop:
                return False
            if not runs and not self._woken:
                self._stop = None
                return False
        return True

    def _send(self) -> bool:
        calls = [call for study in list(self._studies.values()) if (call := study.heartbeat_call())]
        if calls and self._node is None:
            self._node = self._make_node()
        for keys, args in calls:
            assert self._node is not None  # noqa: S101
            self._node.run(script("record_heartbeat"), keys, args)
        return bool(calls)


def _beat_for_ever(heartbeats: weakref.ref[Heartbeats], stop: threading.Event, interval: float) -> None:
    while not stop.wait(interval):
        alive = heartbeats()
        if alive is None or not alive.beat(stop):
            return
        del alive
