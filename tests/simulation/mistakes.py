"""Mistakes that the simulation has to notice: in a script, or in the Python code while a schedule runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna_dlock.ensemble
import optuna_dlock.fanout
import optuna_dlock.master
import optuna_dlock.repair
from optuna_dlock.ensemble import Ensemble
from optuna_dlock.open_ballot import OpenBallot
from optuna_dlock.quorum import State
from tests.simulation.schedule import Setup
from tests.simulation.server import Mutations

_Patch = tuple[Any, str, object]


def _patched(*patches: _Patch) -> Callable[[], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        saved = [(where, name, getattr(where, name)) for where, name, _ in patches]
        for where, name, new in patches:
            setattr(where, name, new)
        try:
            yield
        finally:
            for where, name, old in saved:
                setattr(where, name, old)

    return patched


def _lua(*replaced: tuple[str, str]) -> Setup:
    return Setup(mutations=Mutations(*replaced))


def _latest(states: Mapping[int, State], n: int) -> int | None:
    """Believes the first one that answers."""
    return max(states, key=lambda index: states[index].order) if states else None


def _shared(prefix: str, address: str, run: str) -> str:
    return f"{prefix}@shared"


def _named(
    on_master: Callable[[str, str, str], str],
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Other names for the keys of a master."""
    where = (optuna_dlock.master, optuna_dlock.repair)
    return _patched(*((module, "on_master", on_master) for module in where))


_NO_BALLOT_CHECK = "elseif f[1] ~= ARGV[na - 5] then\n  return {-21, f[1]}\nelseif f[3]", "elseif f[3]"
_VOTES_AT_ONCE = (
    "  return {-20} -- no data, or not all of it yet: a master that has forgotten must not vote",
    "  redis.call('HSET', KEYS[1], 'p', '0', 'l', 0, 'a', '0', 's', '0', 'i', '0')\n"
    "  f = {'0', 0, '0', '0', '0'}",
)

# Too rare for this, and found by the model in tests/protocol: a rebuild from one other master (one schedule
# in about 500 notices it), votes of earlier runs that are counted, a replay under the old ballot, a master
# that says what follows under a ballot that is closed (the others refuse it).
# Not noticed: on KeyDB, what came back by a resync is not deleted again (tests/test_keydb.py shows it).
MISTAKES: dict[str, Setup] = {
    "a commit without the ballot check": _lua(_NO_BALLOT_CHECK),
    "a reader that believes a minority": Setup(patches=_patched((optuna_dlock.ensemble, "decided", _latest))),
    "a restarted master that votes at once": _lua(_VOTES_AT_ONCE),
    "the same key names on masters that replicate to each other": Setup(
        begins="founded",
        masters="replicated",
        patches=_named(_shared),
    ),
    # Beyond what issue 3 names:
    "a commit by a master that is behind": _lua(("f[3] ~= ARGV[na - 4] or f[4] ~= ARGV[na - 3]", "false")),
    "a majority of less than half": Setup(
        patches=_patched((optuna_dlock.fanout, "majority", lambda n: max(1, n // 2)))
    ),
    "states are ranked by nothing": Setup(
        patches=_patched((State, "order", property(lambda state: ("", 0))))
    ),
    "a lower ballot is promised too": _lua(("f[1] > ARGV[1]", "false")),
    "a copy leaves out what was written to running trials": _lua(
        ("redis.call('RENAME', ARGV[9] .. number, ARGV[8] .. number)", "")
    ),
    "creating a study looks for what is there already": Setup(
        begins="empty", mutations=Mutations(("if ARGV[6] ~= '1' then\n  for", "if true then\n  for"))
    ),
    "a write that was sent is not looked at again": Setup(
        patches=_patched((Ensemble, "_collect", lambda self: bool(self._outstanding.clear())))
    ),
    "a ballot that is open before its master was brought up to date": _lua(
        (
            "'HSET', KEYS[1], 'p', ARGV[1], 'l', string",
            "'HSET', KEYS[1], 'o', ARGV[1], 'p', ARGV[1], 'l', string",
        )
    ),
    "sections that are passed on under a ballot that was overtaken": _lua(
        ("elseif f[1] ~= ARGV[1] then\n  return {-21, f[1]}\nend\nlocal seq, last", "end\nlocal seq, last")
    ),
    "a section of which only the first master knows": Setup(
        patches=_patched((OpenBallot, "pass_on", lambda self, reply=None: True))
    ),
    "a creation that forgets its last operation": _lua(("tonumber(sequence) == tonumber(ARGV[3])", "false")),
    "a finish that does not look at the version": _lua(("(head[1] or '0') ~= ARGV[2]", "false")),
    "a claim of what is claimed": _lua(("state == 0 and string.byte(old, 2) ~= 4", "false")),
}
