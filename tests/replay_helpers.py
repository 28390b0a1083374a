"""Groups, settings and restarts for the tests of the buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rexrag.arrow import group_to_ipc
from rexrag.buffer.damage import examine
from rexrag.buffer.ledger import Ledger
from rexrag.buffer.log_writer import LogWriteError
from rexrag.buffer.records import Record
from rexrag.buffer.recovery import begin_records
from rexrag.buffer.settings import ReplaySettings
from rexrag.buffer.state import ReplayState
from rexrag.types import EndReason, GroupLease, Kind, Origin, Question, Trajectory, TrajectoryGroup


def make_questions(num: int) -> tuple[Question, ...]:
    return tuple(
        Question(id=str(i), data_source="world", question=f"Who is {i}?", golden_answers=(f"{i}",)) for i in range(num)
    )


def make_settings(folder: Path, **changes: float | None) -> ReplaySettings:
    """Small settings; `num_questions` questions, other changes by their names."""
    num_questions = int(changes.pop("num_questions", 6) or 0)
    values: dict[str, float | None] = {"groups_per_step": 2, "max_staleness": 2, "seed": 0, "lease_timeout_s": 10.0}
    values |= {
        "lease_deadline_s": 100.0,
        "max_attempts": 2,
        "segment_bytes": 1 << 20,
        "first_step": 0,
        "num_steps": None,
        "refill": False,
        "log_file": None,
        **changes,
    }
    return ReplaySettings(folder=folder, questions=make_questions(num_questions), **values)  # type: ignore[arg-type]


def make_group(
    group_id: str, question: str, *, versions: Sequence[int] = (0,), num_rows: int = 2, num_tokens: int = 6
) -> TrajectoryGroup:
    """Rows of a two-token prompt and `num_tokens` policy tokens, whose versions go evenly through `versions`."""
    token_versions = np.repeat(np.asarray(versions, np.int32), -(-num_tokens // len(versions)))[:num_tokens]
    row = Trajectory(
        kind=Kind.TARGET,
        parent=None,
        branch_point=None,
        hint_id=None,
        reward=1.0,
        em=1.0,
        f1=1.0,
        correct=True,
        end_reason=EndReason.ANSWER,
        num_searches=1,
        num_malformed=0,
        gold_retrieved=True,
        prompt_length=2,
        token_ids=np.arange(2 + num_tokens, dtype=np.int32),
        origin=np.asarray([Origin.PROMPT] * 2 + [Origin.POLICY] * num_tokens, np.uint8),
        behavior_logprob=np.asarray([0.0] * 2 + [-0.5] * num_tokens, np.float32),
        policy_version=np.concatenate([np.full(2, versions[0], np.int32), token_versions]),
        action_starts=np.array([2], np.int32),
    )
    return TrajectoryGroup(
        group_id=group_id, question_id=question, data_source="world", hops=None, trajectories=(row,) * num_rows
    )


def make_ipc(
    lease: GroupLease, *, versions: Sequence[int] | None = None, num_rows: int = 2, num_tokens: int = 6
) -> bytes:
    versions = versions or (lease.version.step,)
    key = lease.question.key
    group = make_group(lease.group_id, key, versions=versions, num_rows=num_rows, num_tokens=num_tokens)
    return group_to_ipc(group)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class ListJournal:
    """A journal in memory that can refuse to write, as a full disk does. A segment has `segment_records` records."""

    records: list[Record] = field(default_factory=list)
    is_disk_full: bool = False
    segment_records: int = 10**9
    number: int = 1
    num_in_segment: int = 0

    @property
    def is_full(self) -> bool:
        return self.num_in_segment >= self.segment_records

    def write(self, records: Sequence[Record]) -> None:
        if self.is_disk_full:
            raise LogWriteError("no space left")
        self.records.extend(records)
        self.num_in_segment += len(records)

    def roll(self, head: Record) -> None:
        self.number, self.num_in_segment = self.number + 1, 0
        self.write([head])


def fold(records: Sequence[Record]) -> Ledger:
    ledger = Ledger()
    for record in records:
        ledger.apply(record)
    return ledger


def restart(
    settings: ReplaySettings, journal: ListJournal, *, clock: Clock, incarnation: str, resume_step: int
) -> ReplayState:
    """What `open_buffer` does, over records in memory."""
    ledger = fold(journal.records)
    findings = examine(
        ledger, [], first_step=settings.first_step, resume_step=resume_step, max_attempts=settings.max_attempts
    )
    assert not findings.sentences(), "a log that a crash ended is whole"
    records = begin_records(ledger, settings, incarnation=incarnation, resume_step=resume_step, findings=findings)
    journal.write(records)
    for record in records:
        ledger.apply(record)
    return ReplayState(settings, ledger=ledger, journal=journal, clock=clock)
