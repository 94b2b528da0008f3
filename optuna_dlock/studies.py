"""The registry of studies: names, ids, directions, attributes; and the check of the server behind it."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.study import StudyDirection

from optuna_dlock.codec import dump_json, load_json
from optuna_dlock.ensemble import AnyNode, Ensemble
from optuna_dlock.errors import (
    CorruptRecordError,
    DataLostError,
    DLockError,
    MembershipError,
    ServerConfigurationError,
    StudyExistsError,
    StudyNotFoundError,
)
from optuna_dlock.keys import FORMAT_VERSION, LockKeys, RegistryKeys, StudyKeys, unpack_members
from optuna_dlock.scripts import EXISTS, FOREIGN, NO_STUDY, script
from optuna_dlock.section import Section

_logger = logging.getLogger(__name__)
_SWEEP = 1000  # keys deleted in one go


class StudyInfo:
    """What never changes about a study."""

    __slots__ = ("directions", "name")

    def __init__(self, name: str, directions: list[StudyDirection]) -> None:
        self.name = name
        self.directions = directions


class Registry:
    """All studies under one prefix.

    Args:
        client: Gives the name by which the server knows this process.
        section: Gives the critical sections of a study.
    """

    def __init__(self, prefix: str, client: Callable[[], str], section: Callable[[int], Section]) -> None:
        self._prefix = prefix
        self._client = client
        self._section = section
        self._keys = RegistryKeys(prefix)
        self._uid: bytes | None = None
        self._infos: dict[int, StudyInfo] = {}

    def forget(self) -> None:
        """Drop what was learned from the server."""
        self._infos.clear()

    def study_keys(self, study_id: int) -> StudyKeys:
        """Key names of a study."""
        return StudyKeys(self._prefix, study_id)

    # -- the server --------------------------------------------------------------------------------

    def check_server(self, node: AnyNode) -> None:
        """Refuse a server this package must not work on (G8).

        Raises:
            ServerConfigurationError: If it evicts keys.
            CorruptRecordError: If data of another format or of somebody else stands under our prefix.
            DataLostError: If it is not the data set that this object worked on before.
        """
        if isinstance(node, Ensemble):
            uid = node.command("HGET", self._keys.info, "uid")
            self._check_uid(node, uid)
            return
        policy = _eviction_policy(node)
        if policy is not None and policy != "noeviction":
            raise ServerConfigurationError(
                f"{node.address} has maxmemory-policy {policy!r}: it may throw trials away; "
                "set maxmemory-policy noeviction",
                address=node.address,
            )
        found, uid = node.command("HMGET", self._keys.info, "format", "uid")
        if found is not None and found != str(FORMAT_VERSION).encode():
            raise CorruptRecordError(
                f"key {self._keys.info!r} on {node.address} has format {found.decode('utf-8', 'replace')!r}; "
                f"this version of optuna_dlock works on format {FORMAT_VERSION}",
                key=self._keys.info,
            )
        members = node.command("GET", self._keys.members)
        if members is not None:
            listed = unpack_members(members)
            raise MembershipError(
                f"{node.address} is one of the masters {', '.join(listed)}: give their whole list as the URL",
                address=node.address,
                members=listed,
            )
        self._check_uid(node, uid)

    def _check_uid(self, node: AnyNode, uid: bytes | None) -> None:
        if self._uid is not None and uid != self._uid:
            raise DataLostError(
                f"{node.address} does not hold the studies it held before: it lost its data (a restart "
                "without persistence?) or it is another server; restart the workers to begin anew, and turn "
                "on appendonly to keep data over restarts",
                address=node.address,
            )
        self._uid = uid

    def _learn_uid(self, node: AnyNode) -> None:
        if self._uid is None:
            self._uid = node.command("HGET", self._keys.info, "uid")

    # -- studies -----------------------------------------------------------------------------------

    def create(self, node: AnyNode, name: str, directions: Sequence[StudyDirection]) -> int:
        """Register a study.

        Raises:
            StudyExistsError: If the name is taken.
            CorruptRecordError: If foreign keys stand where the study's own would.
        """
        study_id = int(node.run(script("next_study_id"), [self._keys.info]))
        keys = self.study_keys(study_id)
        others = [key for key in keys.everything_but_trials() if key not in (keys.meta, keys.ballots)]
        described = json.dumps({"name": name, "directions": [d.value for d in directions]})
        reply = node.run(
            script("create_study"),
            [self._keys.names, self._keys.studies, self._keys.info, keys.meta, keys.ballots, *others],
            [
                *(str(study_id), _text(name), described, FORMAT_VERSION, secrets.token_hex(8)),
                int(isinstance(node, Ensemble)),
            ],
        )
        if reply[0] == EXISTS:
            raise StudyExistsError(
                f"a study named {name!r} exists already; pass load_if_exists=True to create_study to join it",
                study_name=name,
            )
        if reply[0] == FOREIGN:
            key = reply[1].decode()
            raise CorruptRecordError(
                f"key {key!r} on {node.address} exists, but no study of ours made it: choose another "
                "?prefix=NAME, or delete the key",
                key=key,
            )
        self._learn_uid(node)
        self._infos[study_id] = StudyInfo(name, list(directions))
        return study_id

    def delete(self, node: AnyNode, study_id: int) -> None:
        """Delete a study, and sweep away what earlier deletions left behind.

        Raises:
            StudyNotFoundError: If it does not exist.
        """
        info = self._fetch(node, study_id)
        with self._section(study_id).hold():
            reply = node.run(
                script("delete_study"),
                [self._keys.names, self._keys.studies, self._keys.trash, self.study_keys(study_id).meta],
                [str(study_id), _text(info.name)],
            )
            if reply[0] == NO_STUDY:
                raise _not_found(study_id)
        for swept in node.command("SMEMBERS", self._keys.trash):
            self._sweep(node, int(swept))
        self._infos.pop(study_id, None)

    def _sweep(self, node: AnyNode, study_id: int) -> None:
        keys = self.study_keys(study_id)
        trials = [keys.trial(int(number)) for number in node.command("HKEYS", keys.live)]
        fence = LockKeys(keys.lock).fence  # nothing is left for it to fence
        rest = [*keys.everything_but_trials(), fence]
        sweep = script("sweep_study")
        for start in range(0, len(trials), _SWEEP):
            node.run(sweep, [self._keys.trash, *trials[start : start + _SWEEP]], [str(study_id), 0])
        node.run(sweep, [self._keys.trash, *rest], [str(study_id), 1])

    def id_of(self, node: AnyNode, name: str) -> int:
        """Id of the study of this name.

        Raises:
            StudyNotFoundError: If there is none.
        """
        study_id = node.command("HGET", self._keys.names, _text(name))
        if study_id is None:
            raise StudyNotFoundError(f"no study named {name!r} on {node.address}")
        return int(study_id)

    def info(self, node: AnyNode, study_id: int) -> StudyInfo:
        """Name and directions; asked for once.

        Raises:
            StudyNotFoundError: If there is no such study.
        """
        info = self._infos.get(study_id)
        return info if info is not None else self._fetch(node, study_id)

    def _fetch(self, node: AnyNode, study_id: int) -> StudyInfo:
        described = node.command("HGET", self._keys.studies, str(study_id))
        if described is None:
            raise self.gone(node, study_id)
        info = self._infos[study_id] = self._read(described)
        self._learn_uid(node)
        return info

    def _read(self, described: bytes) -> StudyInfo:
        try:
            fields = json.loads(described)
            return StudyInfo(fields["name"], [StudyDirection(d) for d in fields["directions"]])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptRecordError(
                f"key {self._keys.studies!r} holds an unreadable study: {error}", key=self._keys.studies
            ) from error

    def gone(self, node: AnyNode, study_id: int) -> DLockError:
        """The error for a study that a script did not find."""
        self._infos.pop(study_id, None)
        try:
            self.check_server(node)
        except DataLostError as error:
            return error
        return _not_found(study_id)

    def all(self, node: AnyNode) -> list[tuple[int, StudyInfo, dict[str, Any], dict[str, Any]]]:
        """Every study with its user and system attributes, by id; two round trips."""
        found = _pairs(node.command("HGETALL", self._keys.studies))
        ids = sorted(int(study_id) for study_id in found)
        keys = [self.study_keys(study_id) for study_id in ids]
        attrs = [
            *((k.meta, k.user_attrs) for k in keys),
            *((k.meta, k.system_attrs) for k in keys),
        ]
        replies = node.run_many(script("get_study_attrs"), [(pair, ()) for pair in attrs]) if ids else []
        result = []
        for at, study_id in enumerate(ids):
            user, system = replies[at], replies[at + len(ids)]
            if user[0] == NO_STUDY or system[0] == NO_STUDY:
                continue  # deleted in between
            info = self._infos[study_id] = self._read(found[str(study_id).encode()])
            result.append(
                (
                    study_id,
                    info,
                    _read_attrs(user[1], keys[at].user_attrs),
                    _read_attrs(system[1], keys[at].system_attrs),
                )
            )
        self._learn_uid(node)
        return result

    # -- attributes --------------------------------------------------------------------------------

    def set_attr(self, node: AnyNode, study_id: int, system: bool, key: str, value: Any) -> None:
        """Set one attribute of a study."""
        keys = self.study_keys(study_id)
        section = self._section(study_id)
        reply = section.run(
            script("set_study_attr"),
            [keys.meta, section.key(), keys.ops, keys.system_attrs if system else keys.user_attrs],
            [_text(key), dump_json(value, key), self._client(), node.next_sequence()],
        )
        if reply[0] == NO_STUDY:
            raise self.gone(node, study_id)

    def attrs(self, node: AnyNode, study_id: int, system: bool) -> dict[str, Any]:
        """All user or all system attributes of a study."""
        keys = self.study_keys(study_id)
        attrs = keys.system_attrs if system else keys.user_attrs
        reply = node.run(script("get_study_attrs"), [keys.meta, attrs])
        if reply[0] == NO_STUDY:
            raise self.gone(node, study_id)
        return _read_attrs(reply[1], attrs)


def _not_found(study_id: int) -> StudyNotFoundError:
    return StudyNotFoundError(f"no study with study_id {study_id} exists")


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _pairs(flat: Any) -> dict[bytes, bytes]:
    if isinstance(flat, Mapping):  # RESP3 answers HGETALL with a map
        return dict(flat)
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _read_attrs(flat: Sequence[bytes], key: str) -> dict[str, Any]:
    return {
        name.decode("utf-8", "surrogatepass"): load_json(value, key) for name, value in _pairs(flat).items()
    }


def _eviction_policy(node: AnyNode) -> str | None:
    try:
        text = node.command("INFO", "memory")
    except DLockError as error:
        if "unknown command" in str(error):
            return None  # fakeredis has no INFO, and no memory limit either
        raise
    for line in text.decode("utf-8", "replace").splitlines():
        if line.startswith("maxmemory_policy:"):
            return str(line.partition(":")[2].strip())
    return None
