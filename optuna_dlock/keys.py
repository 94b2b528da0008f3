"""Names of all keys on the server. No other module builds one."""

from __future__ import annotations

DEFAULT_PREFIX = "optuna"
FORMAT_VERSION = 1


class RegistryKeys:
    """Keys that belong to no study: who exists, and which id comes next."""

    def __init__(self, prefix: str) -> None:
        base = f"{prefix}:{{registry}}:"
        self.info = base + "info"  # hash: format version, uid of this data set, last study id
        self.names = base + "names"  # hash: study name -> id
        self.studies = base + "studies"  # hash: id -> name and directions
        self.trash = base + "trash"  # set: ids of deleted studies whose keys are not all swept yet


class StudyKeys:
    """Keys of one study, all under one hash tag (one slot of a Redis Cluster)."""

    def __init__(self, prefix: str, study_id: int) -> None:
        base = f"{prefix}:{{{study_id}}}:"
        self.meta = base + "meta"  # hash: number of trials, revision of the log's first entry
        self.lock = base + "lock"  # the section lock, see lock_keys()
        self.ops = base + "ops"  # hash: client -> last operation and its number (G6)
        self.live = base + "live"  # hash: number -> record of each unfinished trial
        self.log = base + "log"  # list, capped: changes of unfinished trials
        self.finished = base + "finished"  # hash: number -> record of each finished trial
        self.order = base + "order"  # list: numbers in the order of finishing
        self.waiting = base + "waiting"  # sorted set: numbers of WAITING trials
        self.offers = base + "offers"  # hash: number -> client the head of the queue was shown to
        self.heartbeats = base + "heartbeats"  # sorted set: number, scored by server time in ms
        self.dists = base + "dists"  # list: distribution by id, as JSON [name, distribution]
        self.dist_ids = base + "distids"  # hash: the same JSON -> id
        self.claims = base + "claims"  # hash: parameter name -> kind of distribution it must keep
        self.user_attrs = base + "user"  # hash: key -> JSON
        self.system_attrs = base + "system"  # hash: key -> JSON
        self._trial = base + "t:"

    def trial(self, number: int) -> str:
        """Hash of what was written to an unfinished trial after its record in `live`."""
        return self._trial + str(number)

    def everything_but_trials(self) -> list[str]:
        """All keys whose names do not depend on a trial number."""
        return [value for name, value in vars(self).items() if name not in ("_trial", "lock")]


class LockKeys:
    """Keys of one lock; `holder` exists exactly while somebody holds it."""

    def __init__(self, holder: str) -> None:
        self.holder = holder  # string: ticket, fencing token, since when, owner
        self.fence = holder + ":fence"  # counter: the last fencing token given
        self.queue = holder + ":queue"  # list: tickets of waiters, in order
        self._wake = holder + ":wake:"

    def wake(self, ticket: str) -> str:
        """List on which the waiter with this ticket is woken."""
        return self._wake + ticket


def lock_keys(prefix: str, name: str) -> LockKeys:
    """Keys of the user's lock `name`; `study:<id>` is the section lock of that study."""
    kind, _, study_id = name.partition(":")
    if kind == "study" and study_id.isdecimal():
        return LockKeys(StudyKeys(prefix, int(study_id)).lock)
    return LockKeys(f"{prefix}:{{lock:{name}}}:lock")
