"""The durable truth about groups and questions: a fold over the records of the log, in order.

    Issue ─▶ OPEN ─Finish─▶ FINISHED ─Assign─▶ ASSIGNED ─Outcome─▶ CONSUMED
               └──────────────┴──────Drop───────┴──────────────────┴─▶ DROPPED

The same fold runs while the buffer works and when it recovers, so a crash at any moment loses no more than the records
that were not written yet. It accepts the gaps of a damaged log: what a record says of a group that is not known makes
it known. At any moment issued = consumed + Σ dropped + pending.

It stays small however long a run is: what no resume can take back is counted and forgotten (`Settle`).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from sys import intern
from typing import Any, Final, TypedDict

from rexrag.buffer.records import (
    Assign,
    Begin,
    Drop,
    DropReason,
    Finish,
    Issue,
    Outcome,
    Record,
    Settle,
    Snapshot,
    Then,
)


class GroupState(StrEnum):
    OPEN = "open"
    FINISHED = "finished"
    ASSIGNED = "assigned"
    CONSUMED = "consumed"
    DROPPED = "dropped"


PENDING: Final = (GroupState.OPEN, GroupState.FINISHED, GroupState.ASSIGNED)


class Accounting(TypedDict):
    """Group counts: always issued = consumed + Σ dropped + pending. `given_up` counts questions."""

    issued: int
    consumed: int
    dropped: dict[str, int]
    pending: int
    given_up: int


@dataclass(slots=True, kw_only=True)
class Group:
    """What the log says of one group. `order` is the order of admission; `question` is "" where damage hides it."""

    group_id: str
    order: int
    epoch: int
    question: str
    attempt: int
    version: int
    state: GroupState = GroupState.OPEN
    was_finished: bool = False
    min_version: int | None = None
    max_version: int | None = None
    step: int | None = None
    payload: bytes | memoryview | None = None


_TOLD: Final = tuple(item.name for item in dataclasses.fields(Group) if item.name != "payload")
"""What a snapshot says of a group."""


def what_then(group: Group | None, reason: DropReason, *, max_attempts: int | None = None) -> Then:
    """What becomes of a dropped group's question; `lost` counts as no attempt."""
    if group is None or not group.question or reason is DropReason.FLAT:
        return Then.ELSEWHERE
    if reason is DropReason.LOST or max_attempts is None or group.attempt < max_attempts:
        return Then.AGAIN
    return Then.GIVEN_UP


def is_settled(group: Group, step: int) -> bool:
    """Whether nothing can become of a group any more, where no resume goes on from before `step`."""
    is_consumed = group.state is GroupState.CONSUMED and group.step is not None and group.step <= step
    return is_consumed or group.state is GroupState.DROPPED


class Ledger:
    """Groups by state, and what each epoch's questions came to.

    Attributes:
        groups: all groups that are not settled.
        again: (epoch, question) → attempt, for questions to be asked again, in the order they came back.
        first_open_epoch: in those before it all questions were issued.
        asked: epoch from there on → questions issued at least once.
        live: (epoch, question) → the one group of it that is pending or consumed, and not settled.
        superseded: groups that a later `Issue` of the same question contradicts (damage only).
        steps: step → groups, of assigned steps without an outcome.
        last_step: last step that has a batch, or that the last incarnation resumed at.
        settled_step: no resume goes on from before it. first_segment: the log's older ones were deleted.
        begins: the incarnations, oldest first.
        known_steps: incarnation → steps after `settled_step` that it has a batch of.
        missing: ids that must have been issued, since later ones of their incarnation were (damage only).
    """

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.again: dict[tuple[int, str], int] = {}
        self.first_open_epoch = 0
        self.asked: dict[int, set[str]] = {}
        self.live: dict[tuple[int, str], str] = {}
        self.superseded: list[str] = []
        self.steps: dict[int, tuple[str, ...]] = {}
        self.last_step = 0
        self.settled_step = 0
        self.first_segment = 1
        self.begins: list[Begin] = []
        self.known_steps: dict[str, set[int]] = {}
        self.missing: set[str] = set()
        self._num_issued = 0
        self._next_number: dict[str, int] = {}
        self._num_settled = 0
        self._by_state: Mapping[GroupState, dict[str, Group]] = {state: {} for state in GroupState}
        self._dropped: Counter[str] = Counter()
        self._given_up = 0

    @property
    def begin(self) -> Begin | None:
        """The newest incarnation."""
        return self.begins[-1] if self.begins else None

    def in_state(self, state: GroupState) -> Mapping[str, Group]:
        return self._by_state[state]

    def in_order(self, *states: GroupState) -> list[Group]:
        """Groups in any of these states, in order of admission."""
        groups = [group for state in states for group in self._by_state[state].values()]
        return sorted(groups, key=lambda group: group.order)

    def accounting(self) -> Accounting:
        return Accounting(
            issued=self._num_issued,
            consumed=self._num_settled + len(self._by_state[GroupState.CONSUMED]),
            dropped=dict(sorted(self._dropped.items())),
            pending=sum(len(self._by_state[state]) for state in PENDING),
            given_up=self._given_up,
        )

    def apply(self, record: Record) -> None:
        match record:
            case Begin():
                self.begins.append(record)
                self.last_step = record.resume_step
                self.settled_step = min(self.settled_step, record.resume_step)
                self.steps.clear()
            case Issue():
                self._issue(record)
            case Finish():
                self._finish(record)
            case Drop():
                self._drop(record)
            case Assign():
                self._assign(record)
            case Outcome():
                self._outcome(record)
            case Settle():
                self._settle(record)
            case Snapshot():
                self._restore(record)

    def snapshot(self) -> Snapshot:
        """What the ledger holds, but for the bytes of groups."""
        told = {
            "groups": [[getattr(group, name) for name in _TOLD] for group in self.groups.values()],
            "states": {state: list(groups) for state, groups in self._by_state.items()},
            "again": [[*key, attempt] for key, attempt in self.again.items()],
            "first_open_epoch": self.first_open_epoch,
            "asked": {epoch: sorted(keys) for epoch, keys in self.asked.items()},
            "live": [[*key, group_id] for key, group_id in self.live.items()],
            "superseded": self.superseded,
            "steps": self.steps,
            "last_step": self.last_step,
            "settled_step": self.settled_step,
            "first_segment": self.first_segment,
            "begins": [dataclasses.asdict(begin) for begin in self.begins],
            "known_steps": {name: sorted(steps) for name, steps in self.known_steps.items()},
            "missing": sorted(self.missing),
            "num_issued": self._num_issued,
            "next_number": self._next_number,
            "num_settled": self._num_settled,
            "dropped": self._dropped,
            "given_up": self._given_up,
        }
        return Snapshot(payload=json.dumps(told, separators=(",", ":")).encode())

    def _restore(self, record: Snapshot) -> None:
        """Become what the snapshot says: the same in a whole log; in a damaged one, what the lost records came to."""
        told: dict[str, Any] = json.loads(bytes(record.payload))
        payloads = {group_id: group.payload for group_id, group in self.groups.items()}
        groups = [Group(**dict(zip(_TOLD, values, strict=True))) for values in told["groups"]]
        for group in groups:
            group.question, group.state = intern(group.question), GroupState(group.state)
            if group.state in (GroupState.FINISHED, GroupState.ASSIGNED):
                group.payload = payloads.get(group.group_id)
        self.groups = {group.group_id: group for group in groups}
        self._by_state = {
            state: {group_id: self.groups[group_id] for group_id in told["states"][state]} for state in GroupState
        }
        self.again = {(epoch, key): attempt for epoch, key, attempt in told["again"]}
        self.first_open_epoch = told["first_open_epoch"]
        self.asked = {int(epoch): set(map(intern, keys)) for epoch, keys in told["asked"].items()}
        self.live = {(epoch, intern(key)): group_id for epoch, key, group_id in told["live"]}
        self.superseded = told["superseded"]
        self.steps = {int(step): tuple(ids) for step, ids in told["steps"].items()}
        self.last_step, self.settled_step = told["last_step"], told["settled_step"]
        self.first_segment = told["first_segment"]
        self.begins = [Begin(**values) for values in told["begins"]]
        self.known_steps = {name: set(steps) for name, steps in told["known_steps"].items()}
        self.missing = set(told["missing"])
        self._num_issued, self._next_number = told["num_issued"], told["next_number"]
        self._num_settled, self._given_up = told["num_settled"], told["given_up"]
        self._dropped = Counter(told["dropped"])

    def _issue(self, record: Issue | Finish) -> Group:
        if (known := self.groups.get(record.group_id)) is not None:
            return known
        key = (record.epoch, intern(record.question))
        group = self._add(record.group_id, epoch=record.epoch, question=key[1])
        group.attempt, group.version = record.attempt, record.version
        self._note_asked(*key)
        self.again.pop(key, None)
        if key in self.live:
            self.superseded.append(self.live[key])
        self.live[key] = record.group_id
        return group

    def _note_asked(self, epoch: int, question: str) -> None:
        if epoch >= self.first_open_epoch:
            self.asked.setdefault(epoch, set()).add(question)
        while self.begin is not None and len(self.asked.get(self.first_open_epoch, ())) >= self.begin.num_questions:
            self.asked.pop(self.first_open_epoch, None)
            self.first_open_epoch += 1

    def _finish(self, record: Finish) -> None:
        group = self._issue(record)
        if group.state is not GroupState.OPEN:
            return
        group.version, group.was_finished, group.payload = record.version, True, record.payload
        group.min_version, group.max_version = record.min_version, record.max_version
        self._move(group, GroupState.FINISHED)

    def _drop(self, record: Drop) -> None:
        group = self._find(record.group_id)
        if group.state is GroupState.DROPPED:
            return
        self._move(group, GroupState.DROPPED)
        self._dropped[record.reason.value] += 1
        group.payload = None
        key = (group.epoch, group.question)
        if self.live.get(key) == group.group_id:
            del self.live[key]
        if record.then is Then.AGAIN and group.question:  # else its epoch asks for it anyway
            self.again[key] = group.attempt + (record.reason is not DropReason.LOST)
        self._given_up += record.then is Then.GIVEN_UP

    def _assign(self, record: Assign) -> None:
        self.known_steps.setdefault(record.incarnation, set()).add(record.step)
        self.steps[record.step] = record.groups
        self.last_step = max(self.last_step, record.step)
        for group_id in record.groups:
            self._advance(group_id, GroupState.ASSIGNED, record.step)

    def _outcome(self, record: Outcome) -> None:
        self.known_steps.setdefault(record.incarnation, set()).add(record.step)
        self.steps.pop(record.step, None)
        self.last_step = max(self.last_step, record.step)
        for group_id in record.groups:
            group = self._advance(group_id, GroupState.CONSUMED, record.step)
            group.payload = None

    def _settle(self, record: Settle) -> None:
        self.settled_step, self.first_segment = record.step, record.first_segment
        settled = [group for group in self.groups.values() if is_settled(group, record.step)]
        for group in settled:
            self._num_settled += group.state is GroupState.CONSUMED
            del self.groups[group.group_id], self._by_state[group.state][group.group_id]
            key = (group.epoch, group.question)
            if self.live.get(key) == group.group_id:
                del self.live[key]
        known = {name: {step for step in steps if step > record.step} for name, steps in self.known_steps.items()}
        self.known_steps = {name: steps for name, steps in known.items() if steps}

    def _advance(self, group_id: str, state: GroupState, step: int) -> Group:
        group = self._find(group_id)
        if group.state is not GroupState.DROPPED:
            group.step = step
            group.was_finished = True
            self._move(group, state)
        return group

    def _find(self, group_id: str) -> Group:
        return self.groups.get(group_id) or self._add(group_id, epoch=-1, question="")

    def _add(self, group_id: str, *, epoch: int, question: str) -> Group:
        group = Group(group_id=group_id, order=self._num_issued, epoch=epoch, question=question, attempt=0, version=0)
        self.groups[group_id] = group
        self._num_issued += 1
        incarnation, _, number = group_id.rpartition("-")
        expected = self._next_number.get(incarnation, 0)
        self.missing.update(f"{incarnation}-{skipped}" for skipped in range(expected, int(number)))
        self.missing.discard(group_id)
        self._next_number[incarnation] = max(expected, int(number) + 1)
        self._by_state[GroupState.OPEN][group_id] = group
        return group

    def _move(self, group: Group, state: GroupState) -> None:
        del self._by_state[group.state][group.group_id]
        self._by_state[state][group.group_id] = group
        group.state = state
