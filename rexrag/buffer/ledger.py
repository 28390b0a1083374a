"""The durable truth about groups and questions: a fold over the records of the log, in order.

    Issue ─▶ OPEN ─Finish─▶ FINISHED ─Assign─▶ ASSIGNED ─Outcome─▶ CONSUMED
               └──────────────┴──────Drop───────┴──────────────────┴─▶ DROPPED

The same fold runs while the buffer works and when it recovers, so a crash at any moment loses no more than the records
that were not written yet. It accepts the gaps of a damaged log: what a record says of a group that is not known makes
it known. At any moment issued = consumed + Σ dropped + pending.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from sys import intern
from typing import Final, TypedDict

from rexrag.buffer.records import Assign, Begin, Drop, DropReason, Finish, Issue, Outcome, Record, Then


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


def what_then(group: Group | None, reason: DropReason, *, max_attempts: int | None = None) -> Then:
    """What becomes of a dropped group's question; `lost` counts as no attempt."""
    if group is None or not group.question or reason is DropReason.FLAT:
        return Then.ELSEWHERE
    if reason is DropReason.LOST or max_attempts is None or group.attempt < max_attempts:
        return Then.AGAIN
    return Then.GIVEN_UP


class Ledger:
    """Groups by state, and what each epoch's questions came to.

    Attributes:
        groups: all groups ever issued.
        again: (epoch, question) → attempt, for questions to be asked again, in the order they came back.
        asked: epoch → questions issued at least once.
        live: (epoch, question) → the one group of it that is pending or consumed.
        superseded: groups that a later `Issue` of the same question contradicts (damage only).
        steps: step → groups, of assigned steps without an outcome.
        last_step: last step that has a batch, or that the last incarnation resumed at.
        begins: the incarnations, oldest first.
        known_steps: incarnation → steps that it has a batch of.
    """

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.again: dict[tuple[int, str], int] = {}
        self.asked: dict[int, set[str]] = {}
        self.live: dict[tuple[int, str], str] = {}
        self.superseded: list[str] = []
        self.steps: dict[int, tuple[str, ...]] = {}
        self.last_step = 0
        self.begins: list[Begin] = []
        self.known_steps: dict[str, set[int]] = {}
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
            issued=len(self.groups),
            consumed=len(self._by_state[GroupState.CONSUMED]),
            dropped=dict(sorted(self._dropped.items())),
            pending=sum(len(self._by_state[state]) for state in PENDING),
            given_up=self._given_up,
        )

    def apply(self, record: Record) -> None:
        match record:
            case Begin():
                self.begins.append(record)
                self.last_step = record.resume_step
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

    def _issue(self, record: Issue | Finish) -> Group:
        if (known := self.groups.get(record.group_id)) is not None:
            return known
        key = (record.epoch, intern(record.question))
        group = self._add(record.group_id, epoch=record.epoch, question=key[1])
        group.attempt, group.version = record.attempt, record.version
        self.asked.setdefault(record.epoch, set()).add(key[1])
        self.again.pop(key, None)
        if key in self.live:
            self.superseded.append(self.live[key])
        self.live[key] = record.group_id
        return group

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
        group = Group(group_id=group_id, order=len(self.groups), epoch=epoch, question=question, attempt=0, version=0)
        self.groups[group_id] = group
        self._by_state[GroupState.OPEN][group_id] = group
        return group

    def _move(self, group: Group, state: GroupState) -> None:
        del self._by_state[group.state][group.group_id]
        self._by_state[state][group.group_id] = group
        group.state = state
