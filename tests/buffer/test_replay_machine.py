"""Random lives of the buffer: actors come, go and repeat themselves, the buffer crashes anywhere in its log."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from replay_helpers import Clock, ListJournal, fold, make_ipc, make_settings, restart

from rexrag.buffer.ledger import GroupState, Ledger
from rexrag.buffer.log_writer import LogWriteError
from rexrag.buffer.records import Assign, Begin, Drop, DropReason, Finish, Issue, Outcome, Settle, Snapshot, Then
from rexrag.errors import UnknownLeaseError
from rexrag.types import GroupLease, LeaseKey, WeightVersion

ACTORS = st.sampled_from(["a", "b", "c"])


class Work:
    """A lease as its actor remembers it, and the version that the actor held then."""

    def __init__(self, actor_id: str, lease: GroupLease) -> None:
        self.actor_id = actor_id
        self.lease = lease
        self.appended = False


class BufferMachine(RuleBasedStateMachine):
    @initialize(
        staleness=st.integers(0, 3),
        groups_per_step=st.integers(1, 3),
        num_questions=st.integers(1, 5),
        max_attempts=st.integers(1, 2),
        segment_records=st.sampled_from([1, 5, 20, 10**6]),
    )
    def begin(
        self, staleness: int, groups_per_step: int, num_questions: int, max_attempts: int, segment_records: int
    ) -> None:
        self.settings = make_settings(
            Path("unused"),
            num_questions=num_questions,
            max_staleness=staleness,
            groups_per_step=groups_per_step,
            max_attempts=max_attempts,
        )
        self.clock, self.num_starts = Clock(), 0
        self.journal = ListJournal(segment_records=segment_records)
        self.settled_step = 0
        self.is_disturbed = False
        self.start(resume_step=0)

    def start(self, *, resume_step: int) -> None:
        self.num_starts += 1
        self.state = restart(
            self.settings, self.journal, clock=self.clock, incarnation=str(self.num_starts), resume_step=resume_step
        )
        self.version = WeightVersion(incarnation=str(self.num_starts), step=resume_step)
        self.state.publish(self.version)
        self.learner_step = resume_step
        self.work: list[Work] = []

    @property
    def ledger(self) -> Ledger:
        return fold(self.journal.records)

    @rule(actor=ACTORS, num=st.integers(1, 4), is_behind=st.booleans())
    def lease(self, actor: str, num: int, is_behind: bool) -> None:
        if is_behind:
            held = WeightVersion(incarnation=self.version.incarnation, step=self.version.step - 1)
            assert self.state.lease(actor, num=num, held=held) == []
            assert self.state.lease(actor, num=num, held=None) == []
            other = WeightVersion(incarnation="other", step=self.version.step + 1)
            assert self.state.lease(actor, num=num, held=other) == []
            return
        leases = self.state.lease(actor, num=num, held=self.version)
        assert len(leases) <= num
        assert all(lease.version == self.version for lease in leases)
        self.work += [Work(actor, lease) for lease in leases]

    @rule(actor=ACTORS, num=st.integers(1, 6), num_left=st.integers(0, 1))
    def produce(self, actor: str, num: int, num_left: int) -> None:
        """All goes well, but for a slow group."""
        leases = self.state.lease(actor, num=num, held=self.version)
        self.work += [Work(actor, lease) for lease in leases]
        for work in self.work[len(self.work) - len(leases) + num_left :]:
            assert self.state.append(actor, lease=work.lease.key, ipc=make_ipc(work.lease)) == "accepted"

    @rule(is_published=st.booleans())
    def learn(self, is_published: bool) -> None:
        self.take(None)
        if self.learner_step + 1 in self.ledger.steps:
            self.finish_step(True, is_published)

    @precondition(lambda self: self.state.status().leased)
    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0, 101.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.is_disturbed = True

    @rule(actor=ACTORS, progress=st.integers(0, 50))
    def renew(self, actor: str, progress: int) -> None:
        mine = {work.lease.key: progress for work in self.work if work.actor_id == actor}
        gone = set(self.state.renew(actor, progress={**mine, LeaseKey("never", 1): 1}))
        assert LeaseKey("never", 1) in gone
        open_groups = self.ledger.in_state(GroupState.OPEN)
        assert all(key in gone for key in mine if key.group_id not in open_groups)

    @rule(actor=ACTORS)
    def release(self, actor: str) -> None:
        self.is_disturbed |= any(work.actor_id == actor and not work.appended for work in self.work)
        self.state.release(actor)
        self.state.release(actor)
        held = {work.lease.key: 1 for work in self.work if work.actor_id == actor}
        assert set(self.state.renew(actor, progress=held)) == set(held)

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """What no resume can take back is forgotten, and its groups are no longer known."""
        step = data.draw(st.integers(self.settled_step, self.learner_step))
        counts, before = self.state.accounting(), self.ledger
        first = self.state.settle(step)
        self.settled_step = step
        assert 0 <= first <= self.journal.number
        assert self.state.accounting() == counts
        assert not self.ledger.in_state(GroupState.DROPPED)
        assert all((group.step or 0) > step for group in self.ledger.in_state(GroupState.CONSUMED).values())
        for group in before.groups.values():
            if group.group_id not in self.ledger.groups:
                with pytest.raises(UnknownLeaseError):
                    self.state.append("late", lease=LeaseKey(group.group_id, 1), ipc=b"anything")
        self.work = [work for work in self.work if work.lease.group_id in self.ledger.groups]

    @precondition(lambda self: self.work)
    @rule(data=st.data(), is_mixed=st.booleans())
    def append(self, data: st.DataObject, is_mixed: bool) -> None:
        work = data.draw(st.sampled_from(self.work))
        group_id = work.lease.group_id
        first = work.lease.version.step
        versions = (first, self.learner_step) if is_mixed else (first,)
        before = self.ledger.groups[group_id]
        try:
            answer = self.state.append(work.actor_id, lease=work.lease.key, ipc=make_ipc(work.lease, versions=versions))
        except UnknownLeaseError:
            assert before.state is GroupState.DROPPED
            return
        assert answer == ("duplicate" if before.was_finished else "accepted")
        work.appended = True
        assert self.state.append("z", lease=LeaseKey(group_id, 0), ipc=b"anything") == "duplicate"

    @precondition(lambda self: self.work)
    @rule(data=st.data(), kind=st.sampled_from(["garbage", "future", "other group"]))
    def append_invalid(self, data: st.DataObject, kind: str) -> None:
        work = data.draw(st.sampled_from(self.work))
        group = self.ledger.groups[work.lease.group_id]
        if group.state is not GroupState.OPEN:
            return
        held = not self.state.renew(work.actor_id, progress={work.lease.key: 0})
        bad = {
            "garbage": b"\x00" * 40,
            "future": make_ipc(work.lease, versions=(self.learner_step + 2,)),
            "other group": make_ipc(dataclasses.replace(work.lease, group_id="0-0")),
        }[kind]
        assert self.state.append(work.actor_id, lease=work.lease.key, ipc=bad) == "invalid"
        assert (self.ledger.groups[group.group_id].state is GroupState.DROPPED) == held

    @precondition(lambda self: self.work)
    @rule(data=st.data())
    def hand_back(self, data: st.DataObject) -> None:
        work = data.draw(st.sampled_from(self.work))
        self.is_disturbed |= not work.appended
        counts = self.state.accounting()
        self.state.hand_back(work.actor_id, lease=work.lease.key)
        assert self.state.renew(work.actor_id, progress={work.lease.key: 1}) == [work.lease.key]
        assert self.state.accounting() == counts

    @precondition(lambda self: self.work)
    @rule(data=st.data(), reason=st.sampled_from(["env_error", "invalid"]))
    def fail(self, data: st.DataObject, reason: str) -> None:
        work = data.draw(st.sampled_from(self.work))
        held = not self.state.renew(work.actor_id, progress={work.lease.key: 0})
        self.state.fail(work.actor_id, lease=work.lease.key, reason=reason)
        assert (self.ledger.groups[work.lease.group_id].state is GroupState.DROPPED) >= held
        counts = self.state.accounting()
        self.state.fail(work.actor_id, lease=work.lease.key, reason=reason)
        assert self.state.accounting() == counts

    @rule(rho=st.sampled_from([None, 0.1]))
    def take(self, rho: float | None) -> None:
        before = self.ledger
        step = self.learner_step + 1
        if not self.state.assign(step, rho=rho):
            return
        batch = self.state.take(step)
        assert self.state.assign(step, rho=0.5)
        assert self.state.take(step) == batch
        ledger = self.ledger
        chosen = [ledger.groups[group_id] for group_id in ledger.steps[step]]
        assert len(chosen) == len(batch.groups) == self.settings.groups_per_step
        for group in chosen:
            assert group.min_version is not None
            assert step - 1 - group.min_version <= self.settings.max_staleness
        if not self.is_disturbed and step not in before.steps:
            finished = sorted(group.order for group in before.in_state(GroupState.FINISHED).values())
            assert [group.order for group in chosen] == finished[: len(chosen)]

    @precondition(lambda self: self.learner_step + 1 in self.ledger.steps)
    @rule(applied=st.booleans(), is_published=st.booleans())
    def finish_step(self, applied: bool, is_published: bool) -> None:
        step = self.learner_step + 1
        groups = self.ledger.steps[step]
        self.state.outcome(step, applied=applied)
        self.state.outcome(step, applied=applied)
        assert all(self.ledger.groups[key].state is GroupState.CONSUMED for key in groups)
        self.learner_step = step
        if is_published:
            self.publish()

    @rule()
    def publish(self) -> None:
        old = self.version
        self.version = WeightVersion(incarnation=old.incarnation, step=self.learner_step)
        self.state.publish(self.version)
        if old.step < self.version.step:
            with pytest.raises(ValueError):
                self.state.publish(old)

    @rule()
    def write_on_full_disk(self) -> None:
        self.journal.is_disk_full = True
        before = len(self.journal.records)
        for work in self.work:
            if self.ledger.groups[work.lease.group_id].state is GroupState.OPEN:
                with pytest.raises(LogWriteError):
                    self.state.append(work.actor_id, lease=work.lease.key, ipc=make_ipc(work.lease))
        self.journal.is_disk_full = False
        assert len(self.journal.records) == before

    @precondition(lambda self: self.learner_step >= self.num_starts)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """The log ends anywhere; the run resumes at any step that the log and the last incarnation allow."""
        first = next(i for i, record in enumerate(self.journal.records) if isinstance(record, Begin))
        most = len(self.journal.records) - first - 1
        num_cut = data.draw(st.one_of(st.integers(0, min(3, most)), st.integers(0, most)))
        kept = self.journal.records[: len(self.journal.records) - num_cut]
        self.journal.records[:] = kept
        ledger = fold(kept)
        assert ledger.begin is not None
        first_step = max(ledger.begin.resume_step, ledger.settled_step)
        resume_step = data.draw(st.integers(first_step, max(first_step, ledger.last_step)))
        self.settled_step = ledger.settled_step
        self.is_disturbed = True
        self.start(resume_step=resume_step)
        for group in self.ledger.groups.values():
            newest = group.max_version if group.state is GroupState.FINISHED else group.step
            assert group.state is GroupState.DROPPED or (newest or 0) <= resume_step
            assert group.state is not GroupState.ASSIGNED

    @invariant()
    def accounts_balance(self) -> None:
        counts = self.state.accounting()
        issued, finals, dropped = count_records(self.journal.records)
        assert counts["issued"] == issued
        assert counts["consumed"] == sum(final == "consumed" for final in finals.values())
        assert counts["dropped"] == dropped
        assert counts["pending"] == issued - len(finals)
        assert counts["issued"] == counts["consumed"] + sum(counts["dropped"].values()) + counts["pending"]

    @invariant()
    def log_tells_all(self) -> None:
        assert describe(self.state._ledger) == describe(self.ledger)

    @invariant()
    def admission_holds(self) -> None:
        status = self.state.status()
        pending = status.waiting + status.leased + status.finished
        unpublished = status.assigned if self.learner_step + 1 in self.ledger.steps else 0
        assert pending + unpublished <= status.capacity

    @invariant()
    def questions_are_asked_once_an_epoch(self) -> None:
        """Each is in exactly one place: a live group, asked again, still in line, or given up."""
        ledger = self.ledger
        records = self.journal.records
        places = Counter([*ledger.live, *ledger.again, *self.state._line, *given_up(records), *settled(records)])
        for epoch in range(self.state.position().epoch + 1):
            for question in self.settings.questions:
                assert places[epoch, question.key] == 1

    @invariant()
    def nothing_is_stale_without_a_cause(self) -> None:
        if not self.is_disturbed:
            assert "stale" not in self.state.accounting()["dropped"]

    def teardown(self) -> None:
        """From wherever it stands, the buffer can go on: no deadlock."""
        if not hasattr(self, "state"):
            return
        self.clock.now += 1000.0
        for _ in range(3):
            self.run_one_step()
            self.accounts_balance()

    def run_one_step(self) -> None:
        self.publish()
        for _ in range(50):
            for lease in self.state.lease("last", num=2, held=self.version):
                self.state.append("last", lease=lease.key, ipc=make_ipc(lease))
            if self.state.assign(self.learner_step + 1, rho=None):
                break
        else:
            pytest.fail(f"no batch: {self.state.status()}")
        self.learner_step += 1
        self.state.outcome(self.learner_step, applied=True)
        self.publish()


def count_records(records: list[Any]) -> tuple[int, dict[str, str], dict[str, int]]:
    """Issued, the end of each group that has one, and drops by reason: counted without the ledger."""
    issued: set[str] = set()
    finals: dict[str, str] = {}
    for record in records:
        match record:
            case Issue() | Finish():
                issued.add(record.group_id)
            case Drop():
                finals[record.group_id] = record.reason.value
            case Outcome():
                finals |= dict.fromkeys(record.groups, "consumed")
            case Assign() | Begin() | Settle() | Snapshot():
                pass
    return len(issued), finals, dict(Counter(final for final in finals.values() if final != "consumed"))


def given_up(records: list[Any]) -> list[tuple[int, str]]:
    questions = {record.group_id: (record.epoch, record.question) for record in records if isinstance(record, Issue)}
    ends = [record for record in records if isinstance(record, Drop) and record.then is Then.GIVEN_UP]
    assert all(end.reason is not DropReason.LOST for end in ends)
    return [questions[end.group_id] for end in ends]


def settled(records: list[Any]) -> list[tuple[int, str]]:
    """Questions whose group was consumed and is known no longer."""
    questions = {record.group_id: (record.epoch, record.question) for record in records if isinstance(record, Issue)}
    known = fold(records).groups
    _, finals, _ = count_records(records)
    return [questions[key] for key, final in finals.items() if final == "consumed" and key not in known]


def describe(ledger: Ledger) -> object:
    groups = {
        key: (g.order, g.epoch, g.question, g.attempt, g.version, g.state, g.was_finished, g.min_version, g.step)
        for key, g in ledger.groups.items()
    }
    return (
        groups,
        list(ledger.again.items()),
        ledger.asked,
        ledger.first_open_epoch,
        ledger.live,
        ledger.steps,
        ledger.accounting(),
    )


BufferMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBufferMachine = BufferMachine.TestCase
