"""The audit: what is on the server, held against every fact that any worker was told (G1-G6)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.audit import audit_numbers
from optuna_dlock.scripts import NO_TRIAL, script
from tests.contention.facts import Fact, Record, read_records

if TYPE_CHECKING:
    from optuna_dlock import RedisLockedStorage
    from tests.contention.worker import Job


class Problem(NamedTuple):
    """Something that breaks a guarantee.

    Attributes:
        kind: "numbers", "lost", "ghost", "finish", "claim", "content", "stale", "trouble", "reread"
            or "litter".
    """

    kind: str
    text: str


def judge_server(job: Job, killed: Collection[str], path: Path) -> None:
    """In a process of its own: audit the server, and write the problems to a file."""
    storage = job.open_storage()
    study_id = storage.get_study_id_from_name(job.study_name)
    trials = storage.get_all_trials(study_id)
    attrs = storage.get_study_user_attrs(study_id)
    problems = judge(trials, attrs, read_records(job.folder), killed)
    again = job.open_storage()
    if again.get_all_trials(study_id) != trials or again.get_study_user_attrs(study_id) != attrs:
        problems.append(Problem("reread", "a second object reads something else"))
    if again.get_n_trials(study_id) != len(trials):
        problems.append(
            Problem("reread", f"{again.get_n_trials(study_id)} trials counted, {len(trials)} read")
        )
    problems += _check_keys(again, study_id, trials)
    path.write_text(json.dumps(problems))


def _check_keys(storage: RedisLockedStorage, study_id: int, trials: Sequence[FrozenTrial]) -> list[Problem]:
    """What the server keeps besides the trials agrees with them, and nothing outlives its trial."""
    node, keys = storage._node, storage._registry.study_keys(study_id)
    finished = sorted(t.number for t in trials if t.state.is_finished())
    unfinished = sorted(t.number for t in trials if not t.state.is_finished())
    waiting = [t.number for t in trials if t.state is TrialState.WAITING]
    written = [int(key.rpartition(b":")[2]) for key in node.command("KEYS", keys.trial(0)[:-1] + "*")]
    kept = {
        "order": (node.command("LRANGE", keys.order, 0, -1), finished),
        "finished": (node.command("HKEYS", keys.finished), finished),
        "live": (node.command("HKEYS", keys.live), unfinished),
        "waiting": (node.command("ZRANGE", keys.waiting, 0, -1), waiting),
    }
    problems = [
        Problem("litter", f"{name}: {sorted(set(map(int, found)) ^ set(right))} differ, or are there twice")
        for name, (found, right) in kept.items()
        if sorted(map(int, found)) != right
    ]
    for number in sorted(set(written) - set(unfinished)):
        # A full resync of KeyDB may have brought it back: it must mean nothing, and go when it is met.
        trial_keys = [keys.trial(number), keys.log, keys.meta, keys.live]
        reply = node.run(script("set_trial_field"), trial_keys, [number, "verdict", "Ux", "1", 1])
        if reply != NO_TRIAL or node.command("EXISTS", keys.trial(number)):
            problems.append(Problem("litter", f"written fields of {number} are left, and answer {reply}"))
    return problems


def judge(
    trials: Sequence[FrozenTrial],
    study_attrs: Mapping[str, Any],
    records: Mapping[str, Record],
    killed: Collection[str],
) -> list[Problem]:
    """Compare a study with what its workers were told.

    Args:
        killed: Names of the workers that were killed; only they may have left a try without outcome.
    """
    verdict = _Verdict(trials, records)
    verdict.check_workers(killed)
    verdict.check_numbers()
    verdict.check_created()
    verdict.check_ghosts()
    verdict.check_finished()
    verdict.check_claims()
    verdict.check_writes()
    verdict.check_study_attrs(study_attrs)
    return verdict.problems


class _Verdict:
    def __init__(self, trials: Sequence[FrozenTrial], records: Mapping[str, Record]) -> None:
        self.problems: list[Problem] = []
        self._trials = trials
        self._records = records
        self._by_number = {t.number: t for t in trials}
        self._by_key: dict[str, list[FrozenTrial]] = {}
        for trial in trials:
            if "key" in trial.user_attrs:
                self._by_key.setdefault(trial.user_attrs["key"], []).append(trial)
        self._created = self._facts("created")
        self._open = [fact for record in records.values() for fact in record.open]

    def _facts(self, kind: str) -> list[Fact]:
        return [fact for record in self._records.values() for fact in record.of(kind)]

    def _open_of(self, *kinds: str) -> list[Fact]:
        return [fact for fact in self._open if fact["what"] in kinds]

    def _problem(self, kind: str, text: str) -> None:
        self.problems.append(Problem(kind, text))

    def check_workers(self, killed: Collection[str]) -> None:
        """Nobody met an error or read something stale; whoever was not killed has left."""
        for name, record in self._records.items():
            for fact in record.of("error"):
                self._problem("trouble", f"{name}: {fact['traceback']}")
            for fact in record.of("stale"):
                self._problem("stale", f"{name}: {fact['text']}")
            if name not in killed and not record.of("left"):
                self._problem("trouble", f"{name} has not left")

    def check_numbers(self) -> None:
        """G1: 0..n-1, and no number was given to two."""
        audit = audit_numbers(t.number for t in self._trials)
        if not audit.ok:
            self._problem("numbers", f"missing {audit.missing}, twice on the server {audit.doubled}")
        given = Counter(fact["number"] for fact in self._created if "number" in fact)
        if twice := sorted(number for number, count in given.items() if count > 1):
            self._problem("numbers", f"given twice: {twice}")

    def check_created(self) -> None:
        """G2: each acknowledged creation is there, with its content."""
        for fact in self._created:
            if "key" not in fact:
                if fact["number"] not in self._by_number:
                    self._problem("lost", f"trial {fact['number']} was acknowledged and is not there")
                continue
            found = self._by_key.get(fact["key"], [])
            if not found:
                self._problem("lost", f"{fact['key']} was acknowledged and is not there")
            for trial in found:
                if fact.get("number", trial.number) != trial.number:
                    self._problem("numbers", f"{fact['key']} is {trial.number}, told {fact['number']}")
                self._check_content(fact, trial)

    def _check_content(self, fact: Fact, trial: FrozenTrial) -> None:
        if fact["how"] == "enqueue":
            if trial.system_attrs.get("fixed_params") != {"x": fact["x"]}:
                self._problem("content", f"{fact['key']} was enqueued with {fact['x']}: {trial}")
            return
        # A popped or running template gets its x from whoever runs it: Optuna keeps the one that is there.
        if trial.params.get("x") != fact["x"]:
            self._problem("content", f"{fact['key']} was created with x={fact['x']}: {trial}")
        if TrialState[fact["state"]].is_finished() and (trial.state.name, trial.values) != (
            fact["state"],
            fact["values"],
        ):
            self._problem("finish", f"{fact['key']} was created {fact['state']} {fact['values']}: {trial}")

    def check_ghosts(self) -> None:
        """G6: each trial was acknowledged, or belongs to a creation whose outcome nobody knows."""
        for key, trials in self._by_key.items():
            if len(trials) > 1:
                self._problem("ghost", f"{key} was created {len(trials)} times: {[t.number for t in trials]}")
        known = {fact["key"] for fact in self._created if "key" in fact}
        known |= {fact["key"] for fact in self._open_of("create")}
        if unknown := set(self._by_key) - known:
            self._problem("ghost", f"nobody created {sorted(unknown)}")
        numbers = {fact["number"] for fact in self._created if "number" in fact}
        unasked = [t.number for t in self._trials if "key" not in t.user_attrs and t.number not in numbers]
        if len(unasked) > len(self._open_of("ask")):
            self._problem(
                "ghost", f"nobody asked for {unasked}; {len(self._open_of('ask'))} died while asking"
            )

    def check_finished(self) -> None:
        """G3: each trial was finished once, as its finisher was told; the refused had lost to somebody."""
        told = self._facts("told")
        for fact in told:
            trial = self._by_number.get(fact["number"])
            result = trial and (trial.state.name, trial.values)
            if result != (fact["state"], fact["values"]):
                self._problem(
                    "finish", f"trial {fact['number']} told {fact['state']} {fact['values']}: {trial}"
                )
        finishers = Counter(fact["number"] for fact in told)
        if twice := sorted(number for number, count in finishers.items() if count > 1):
            self._problem("finish", f"finished by two: {twice}")
        for fact in self._facts("refused"):
            trial = self._by_number.get(fact["number"])
            if trial is None or not trial.state.is_finished():
                self._problem("finish", f"a write to {fact['number']} was refused as finished: {trial}")
        born = {
            fact["key"]
            for fact in [*self._created, *self._open_of("create")]
            if "state" in fact and TrialState[fact["state"]].is_finished()
        }
        dying = self._open_of("tell")
        for trial in self._trials:
            if not trial.state.is_finished() or trial.number in finishers:
                continue
            if trial.user_attrs.get("key") in born or any(_may_be(fact, trial) for fact in dying):
                continue
            self._problem("finish", f"nobody finished trial {trial.number}: {trial}")

    def check_claims(self) -> None:
        """G4: each WAITING trial was claimed once."""
        claims = Counter(fact["number"] for fact in self._facts("popped"))
        if twice := sorted(number for number, count in claims.items() if count > 1):
            self._problem("claim", f"claimed by two: {twice}")
        for number in claims:
            trial = self._by_number.get(number)
            if trial is None or trial.state is TrialState.WAITING:
                self._problem("lost", f"the claim of trial {number} was acknowledged: {trial}")
        queued = {
            fact["key"]
            for fact in self._created
            if fact["how"] == "enqueue" or fact.get("state") == "WAITING"
        }
        taken = [
            t.number
            for key in queued
            for t in self._by_key.get(key, [])
            if t.state is not TrialState.WAITING and t.number not in claims
        ]
        if len(taken) > len(self._open_of("ask", "pop")):
            self._problem("claim", f"nobody claimed {sorted(taken)}")

    def check_writes(self) -> None:
        """G2: parameters, reports and attributes are there from the next waiting call on."""
        for fact in self._facts("wrote"):
            trial = self._by_number.get(fact["number"])
            if trial is None or _field(trial, fact) != fact["value"]:
                self._problem("content", f"{fact} was acknowledged: {trial}")

    def check_study_attrs(self, attrs: Mapping[str, Any]) -> None:
        """G2: the attributes of the study."""
        for name, record in self._records.items():
            told = [fact["value"] for fact in record.of("study attr")]
            tried = [fact["value"] for fact in record.open if fact["what"] == "study attr"]
            allowed = {told[-1]} if told else {None}
            allowed.update(value for value in tried if not told or value > told[-1])
            if attrs.get(name) not in allowed:
                self._problem("content", f"study attribute {name} is {attrs.get(name)}, not in {allowed}")


def _may_be(fact: Fact, trial: FrozenTrial) -> bool:
    if fact["number"] != trial.number or fact["state"] != trial.state.name:
        return False
    return bool(fact["values"] == trial.values or fact["state"] == "PRUNED")


def _field(trial: FrozenTrial, fact: Fact) -> Any:
    where: Mapping[str, Mapping[Any, Any]] = {
        "p": trial.params,
        "i": {str(step): value for step, value in trial.intermediate_values.items()},
        "u": trial.user_attrs,
        "s": trial.system_attrs,
    }
    return where[fact["kind"]].get(fact["name"])
