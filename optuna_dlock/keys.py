"""Names of all keys on the server. No other module builds one."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_PREFIX = "optuna"
FORMAT_VERSION = 1


class RegistryKeys:
    """Keys that belong to no study: who exists, and which id comes next."""

    ballots: str
    sections: str
    leases: str
    fences: str
    released: str

    def __init__(self, prefix: str) -> None:
        base = f"{prefix}:{{registry}}:"
        self.info = base + "info"  # hash: format version, uid of this data set, last study id
        self.names = base + "names"  # hash: study name -> id
        self.studies = base + "studies"  # hash: id -> name and directions
        self.trash = base + "trash"  # set: ids of deleted studies whose keys are not all swept yet
        self.members = base + "members"  # string: the list of masters, where there are several
        _add_masters_keys(self, base)

    def copied(self) -> list[str]:
        """What another master's copy consists of."""
        return [self.info, self.names, self.studies, self.trash, *_masters_keys(self)]


class StudyKeys:
    """Keys of one study, all under one hash tag (one slot of a Redis Cluster)."""

    ballots: str
    sections: str
    leases: str
    fences: str
    released: str

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
        self.workers = base + "workers"  # hash: description of a worker -> its index (1, 2, ...)
        self.ran_by = (
            base + "ranby"
        )  # list: by number, the index of the worker that runs or ran it; 0: nobody
        self.dists = base + "dists"  # list: distribution by id, as JSON [name, distribution]
        self.dist_ids = base + "distids"  # hash: the same JSON -> id
        self.claims = base + "claims"  # hash: parameter name -> kind of distribution it must keep
        self.user_attrs = base + "user"  # hash: key -> JSON
        self.system_attrs = base + "system"  # hash: key -> JSON
        _add_masters_keys(self, base)
        self.trial_base = base + "t:"

    def trial(self, number: int) -> str:
        """Hash of what was written to an unfinished trial after its record in `live`."""
        return self.trial_base + str(number)

    def everything_but_trials(self) -> list[str]:
        """All keys whose names do not depend on a trial number."""
        return [value for name, value in vars(self).items() if name not in ("trial_base", "lock")]

    def copied(self) -> list[str]:
        """What another master's copy consists of, besides the hashes of unfinished trials."""
        own = (self.ballots, self.offers, self.log)
        return [self.lock, *(key for key in self.everything_but_trials() if key not in own), self.log]


# -- several masters --------------------------------------------------------------------------------------


def _add_masters_keys(keys: RegistryKeys | StudyKeys, base: str) -> None:
    keys.ballots = base + "ballots"  # hash: who may run the next section, after which (lua/masters)
    keys.sections = base + "sections"  # list, capped: the last sections, for a master that missed them
    keys.leases = base + "leases"  # hash: name of a lock -> its holder
    keys.fences = base + "fences"  # hash: name of a lock -> the last fencing token given
    keys.released = base + "released"  # hash: client -> ticket of the lock it released last


def _masters_keys(keys: RegistryKeys | StudyKeys) -> list[str]:
    return [keys.sections, keys.leases, keys.fences, keys.released]


def pack_members(members: Sequence[str]) -> str:
    """The list of masters, as it is stored; KeyDB treats small numbers in a way of its own, this is none."""
    return "v:" + ",".join(members)


def unpack_members(stored: bytes) -> list[str]:
    """The list of masters that is stored under `members`."""
    return stored.decode().removeprefix("v:").split(",")


def object_of(key: str) -> str:
    """What the names of all keys of one replicated object begin with: a study's, or the registry's."""
    return key[: key.rindex("}:") + 2]


def on_master(prefix: str, address: str, run: str) -> str:
    """The prefix of all keys that belong to one run of one of several masters.

    What another master replicates to this one, or echoes from an earlier run of it, has other names (KeyDB).
    """
    return f"{prefix}@{address}.{run}"


def run_key(prefix: str, address: str) -> str:
    """Hash: run of this master in which it had data -> since when."""
    return f"{prefix}@{address}:run"


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


def lock_pattern(prefix: str) -> str:
    """A pattern for SCAN that the keys of all held locks match; `lock_name` tells them from others."""
    escaped = "".join(f"[{c}]" if c in "*?[]\\" else c for c in prefix)
    return escaped + ":{*}:lock"


def lock_name(prefix: str, key: str) -> str | None:
    """The name of the lock whose holder stands under a key; None if it is another key."""
    start, end = prefix + ":{", "}:lock"
    if not key.startswith(start) or not key.endswith(end):
        return None
    tag = key[len(start) : -len(end)]
    if tag.isdecimal():
        return f"study:{tag}"
    return tag.removeprefix("lock:") if tag.startswith("lock:") else None
