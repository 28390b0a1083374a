"""The replay buffer as a pure state machine: no Ray, no clock, no file of its own.

    lease ─▶ (actor works, `renew`) ─▶ append ─▶ assign, take ─▶ (learner works) ─▶ outcome, publish
      ▲ admission: waiting + leased + finished + assigned to an unpublished step ≤ (S + 1) · groups_per_step

What must survive a crash is written to the journal first and applied to the ledger after. It is durable once the
journal is synced: whoever answers a caller syncs first. Leases and the published version are in memory only. Every
method is idempotent where Ray or an actor may call it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from rexrag.buffer.journal import Journal
from rexrag.buffer.leases import LeaseTable
from rexrag.buffer.ledger import Accounting, Group, GroupState, Ledger, is_settled, what_then
from rexrag.buffer.line import QuestionLine
from rexrag.buffer.questions import PackedQuestions
from rexrag.buffer.records import Assign, Drop, DropReason, Finish, Issue, Outcome, Record, Settle
from rexrag.buffer.schedule import Candidate, select_batch
from rexrag.buffer.settings import ReplaySettings
from rexrag.buffer.status import BufferPosition, BufferStatus, actor_statuses, is_current
from rexrag.buffer.validation import parse_group
from rexrag.errors import StaleGroupError, UnknownLeaseError, counted
from rexrag.types import AppendOutcome, GroupLease, LeaseKey, StepBatch, WeightVersion

LOG = logging.getLogger(__name__)


class ReplayState:
    """The buffer's rules over a ledger and a journal.

        state, log = open_buffer(settings, resume_step=None, clock=time.monotonic)
        state.publish(WeightVersion(incarnation=state.position().incarnation, step=0))
        (lease,) = state.lease("rollout-0", num=1, held=version)
        state.append("rollout-0", lease=lease.key, ipc=group_to_ipc(group))
        state.assign(1, rho=None)             # False while step 1 has no complete batch
        batch = state.take(1)
        state.outcome(1, applied=True)
        state.publish(WeightVersion(incarnation=state.position().incarnation, step=1))

    Args:
        clock: seconds, never going back.
    """

    def __init__(
        self,
        settings: ReplaySettings,
        *,
        ledger: Ledger,
        journal: Journal,
        clock: Callable[[], float],
        damages: tuple[str, ...] = (),
    ) -> None:
        assert ledger.begin is not None, "an incarnation is durable before the first issue"
        self._settings = settings.without_questions()
        self._ledger = ledger
        self._journal = journal
        self._clock = clock
        self._damages = damages
        self._incarnation = ledger.begin.incarnation
        self._resume_step = ledger.begin.resume_step
        self._questions = PackedQuestions(settings.questions)
        self._leases = LeaseTable(timeout_s=settings.lease_timeout_s, deadline_s=settings.lease_deadline_s)
        self._published: WeightVersion | None = None
        self._unpublished: dict[int, int] = {}
        self._held: dict[str, WeightVersion | None] = {}
        self._num_issued = 0
        self._num_finished = 0
        self._num_flat = 0
        self._segments = {group_id: 0 for group_id, group in ledger.groups.items() if group.was_finished}
        self._line = QuestionLine(ledger, questions=self._questions, seed=settings.seed)

    def lease(self, actor_id: str, *, num: int, held: WeightVersion | None) -> list[GroupLease]:
        """Up to `num` groups in order of admission, not more at once than the actor's share of all that actors can
        hold; none unless it holds the published version or a newer one.

        Raises:
            LogWriteError: new groups cannot be written; nothing was leased.
        """
        self.expire()
        self._held[actor_id] = held
        version = self._published
        if version is None or not is_current(held, version):
            return []
        num = self._leases.fair(actor_id, num, num_leasable=self.num_leasable, num_actors=len(self._held))
        waiting = self._waiting(num)
        new = self._issue(max(0, min(num - len(waiting), self._num_admissible())), version.step)
        groups = [*waiting, *new]
        now = self._clock()
        keys = [
            self._leases.grant(group.group_id, actor_id=actor_id, version=version.step, now=now) for group in groups
        ]
        return [
            GroupLease(
                group_id=group.group_id,
                question=self._questions[group.question],
                epoch=group.epoch,
                attempt=group.attempt,
                version=version,
                grant=key.grant,
            )
            for group, key in zip(groups, keys, strict=True)
        ]

    def expire(self) -> None:
        """End the leases that are over."""
        self._leases.expire(self._clock())

    @property
    def num_leasable(self) -> int:
        """Groups that could be leased now by who holds the published weights."""
        return 0 if self._published is None else self._num_waiting + max(0, self._num_admissible())

    @property
    def has_enough(self) -> bool:
        """Whether as many groups are finished as a step takes."""
        return len(self._ledger.in_state(GroupState.FINISHED)) >= self._settings.groups_per_step

    def is_outdated(self, held: WeightVersion | None) -> bool:
        """Whether an actor that holds `held` must fetch newer weights before it can lease."""
        return self._published is not None and not is_current(held, self._published)

    def renew(self, actor_id: str, *, progress: Mapping[LeaseKey, int]) -> list[LeaseKey]:
        """Renew the leases whose progress number grew; returns those that the actor no longer holds."""
        self.expire()
        return self._leases.renew(actor_id, progress=progress, now=self._clock())

    def release(self, actor_id: str) -> None:
        """The actor has died: its groups go to others at once."""
        self._leases.release(actor_id)
        self._held.pop(actor_id, None)

    def hand_back(self, actor_id: str, *, lease: LeaseKey) -> None:
        """The actor cannot do the group, through no fault of the group's: it goes to others as it is."""
        self._leases.hand_back(actor_id, lease)

    def append(self, actor_id: str, *, lease: LeaseKey, ipc: bytes) -> AppendOutcome:
        """Store a finished group. The first one wins, whoever holds the lease.

        Returns:
            "flat": all rows have equal rewards and `refill` is set; it is dropped, and another question asked.
            "invalid": it is not the group that was leased, or no group; the log says why. It is dropped, and its
            question asked again, unless another lease of it has begun.

        Raises:
            UnknownLeaseError: the group was never issued, was dropped, or is settled.
            LogWriteError: the group is not stored, but still leased.
        """
        group_id = lease.group_id
        self.expire()
        group = self._known(group_id)
        if group.was_finished:
            return "duplicate"
        if group.state is GroupState.DROPPED:
            raise UnknownLeaseError(f"group {group_id} was dropped: abandon it")
        try:
            parsed = parse_group(ipc, group_id=group_id, question=group.question, newest_version=self._ledger.last_step)
        except ValueError as error:
            LOG.error("refused what %s wrote, its question is asked again: %s", actor_id, error)
            self._drop_open(actor_id, lease, group, DropReason.INVALID)
            return "invalid"
        if self._settings.refill and parsed.is_flat:
            self._drop([group], DropReason.FLAT)
            self._num_flat += 1
            return "flat"
        finish = Finish(
            group_id=group_id,
            epoch=group.epoch,
            question=group.question,
            attempt=group.attempt,
            version=self._version_bound(group, parsed.min_version),
            min_version=parsed.min_version,
            max_version=parsed.max_version,
            payload=ipc,
        )
        self._commit([finish])
        self._segments[group_id] = self._journal.number
        self._leases.end(group_id)
        self._num_finished += 1
        return "accepted"

    def fail(self, actor_id: str, *, lease: LeaseKey, reason: str) -> None:
        """The actor gives a group up (`env_error` or `invalid`); nothing happens if it does not hold it any more.

        Raises:
            UnknownLeaseError: the group was never issued.
            ValueError: another reason.
        """
        if reason not in (DropReason.ENV_ERROR, DropReason.INVALID):
            raise ValueError(f"reason {reason!r} is unknown to an actor: env_error or invalid")
        self.expire()
        group = self._known(lease.group_id)
        if group.state is GroupState.OPEN:
            self._drop_open(actor_id, lease, group, DropReason(reason))

    def assign(self, step: int, *, rho: float | None) -> bool:
        """Decide the batch of `step`, once; False while there is none.

        The batch is the first `groups_per_step` finished groups, and waits for leased ones that would otherwise miss
        their last chance (`select_batch`).

        Raises:
            ValueError: not the step after the last, or a step that is over.
        """
        self.expire()
        if step in self._ledger.steps:
            return True
        if step != self._ledger.last_step + 1:
            raise ValueError(f"step {step} cannot be assigned: the next one is {self._ledger.last_step + 1}")
        return self._assign(step, rho)

    def take(self, step: int) -> StepBatch:
        """The batch of `step`, the same each time, until its outcome is told.

        Raises:
            ValueError: no batch was assigned to the step, or it is over.
        """
        if step not in self._ledger.steps:
            raise ValueError(f"step {step} has no batch: the last one with a batch is {self._ledger.last_step}")
        groups = [self._ledger.groups[group_id] for group_id in self._ledger.steps[step]]
        payloads = [group.payload for group in groups if group.payload is not None]
        assert len(payloads) == len(groups), f"step {step} has groups without bytes"
        return StepBatch(step=step, incarnation=self._incarnation, groups=tuple(bytes(data) for data in payloads))

    def outcome(self, step: int, *, applied: bool) -> None:
        """The learner is done with the step, applied or skipped: its groups are consumed.

        Raises:
            ValueError: the step was never taken.
        """
        groups = self._ledger.steps.get(step)
        if groups is not None:
            self._commit([Outcome(incarnation=self._incarnation, step=step, groups=groups, applied=applied)])
        elif step > self._ledger.last_step:
            raise ValueError(f"step {step} has no batch: the last one with a batch is {self._ledger.last_step}")

    def publish(self, version: WeightVersion) -> None:
        """From now on leases need this version.

        Raises:
            ValueError: it goes back, belongs to another incarnation, or is of a step without a batch.
        """
        oldest = self._published.step if self._published is not None else self._resume_step
        if version.step < oldest or (self._published and version.incarnation != self._published.incarnation):
            raise ValueError(f"{version} cannot follow {self._published or oldest}: a version never goes back")
        if version.step > self._ledger.last_step:
            raise ValueError(f"{version} is of no step with a batch: the last is {self._ledger.last_step}")
        self._published = version
        self._unpublished = {step: num for step, num in self._unpublished.items() if step > version.step}

    def settle(self, step: int) -> int:
        """No resume will go on from before `step`: forget what was consumed up to it, and all that was dropped.

        Returns:
            The first segment of the journal with a group that is not settled; once this is durable, older ones can go.

        Raises:
            ValueError: a step that is not over.
        """
        if step > self._ledger.last_step or step in self._ledger.steps:
            raise ValueError(f"step {step} is not over: it cannot be settled")
        settled = {key for key, group in self._ledger.groups.items() if is_settled(group, step)}
        self._segments = {key: number for key, number in self._segments.items() if key not in settled}
        first = max(min(self._segments.values(), default=self._journal.number), self._ledger.first_segment)
        self._commit([Settle(step=max(step, self._ledger.settled_step), first_segment=first)])
        return first

    @property
    def capacity(self) -> int:
        return (self._settings.max_staleness + 1) * self._settings.groups_per_step

    def accounting(self) -> Accounting:
        return self._ledger.accounting()

    def position(self) -> BufferPosition:
        return BufferPosition(
            incarnation=self._incarnation,
            last_step=self._ledger.last_step,
            epoch=self._line.epoch,
            damages=self._damages,
        )

    def status(self) -> BufferStatus:
        self.expire()
        return BufferStatus(
            published=self._published,
            last_step=self._ledger.last_step,
            waiting=self._num_waiting,
            leased=len(self._leases),
            finished=len(self._ledger.in_state(GroupState.FINISHED)),
            assigned=len(self._ledger.in_state(GroupState.ASSIGNED)),
            capacity=self.capacity,
            questions_to_ask_again=len(self._ledger.again),
            num_finished=self._num_finished,
            num_flat=self._num_flat,
            actors=actor_statuses(self._leases, held=self._held, published=self._published, now=self._clock()),
        )

    def _commit(self, records: Sequence[Record]) -> None:
        if self._journal.is_full:
            self._journal.roll(self._ledger.snapshot())
        self._journal.write(records)
        for record in records:
            self._ledger.apply(record)

    def _waiting(self, most: int) -> list[Group]:
        """Issued groups that nobody works on, in order of admission."""
        if not self._num_waiting:
            return []
        groups = self._ledger.in_state(GroupState.OPEN).items()
        return list(islice((group for key, group in groups if key not in self._leases), most))

    @property
    def _num_waiting(self) -> int:
        return len(self._ledger.in_state(GroupState.OPEN)) - len(self._leases)

    def _num_admissible(self) -> int:
        """New groups that may be issued now: within the capacity, and not more than the steps that are left need."""
        settings = self._settings
        unassigned = len(self._ledger.in_state(GroupState.OPEN)) + len(self._ledger.in_state(GroupState.FINISHED))
        free = self.capacity - unassigned - sum(self._unpublished.values())
        if settings.num_steps is None:
            return free
        return min(free, (settings.num_steps - self._ledger.last_step) * settings.groups_per_step - unassigned)

    def _issue(self, num: int, version: int) -> list[Group]:
        """New groups; durable with what follows."""
        turns = self._line.next(num)
        records = [
            Issue(group_id=f"{self._incarnation}-{number}", epoch=epoch, question=key, attempt=attempt, version=version)
            for number, (epoch, key, attempt) in enumerate(turns, self._num_issued)
        ]
        if records:
            self._commit(records)
        self._line.advance(turns)
        self._num_issued += len(records)
        return [self._ledger.groups[record.group_id] for record in records]

    def _known(self, group_id: str) -> Group:
        group = self._ledger.groups.get(group_id)
        if group is None:
            raise UnknownLeaseError(f"group {group_id} was never issued by this buffer, or is settled: abandon it")
        return group

    def _version_bound(self, group: Group, min_version: int | None) -> int:
        """The lease's version, or that of an older token: a group may come from one who has lost the lease."""
        lease = self._leases.get(group.group_id)
        bounds = [version for version in (min_version, None if lease is None else lease.version) if version is not None]
        return min(bounds, default=group.version)

    def _drop_open(self, actor_id: str, lease: LeaseKey, group: Group, reason: DropReason) -> None:
        """Drop an unfinished group, unless it is leased anew."""
        if self._leases.holds(actor_id, lease):
            self._drop([group], reason)

    def _drop(self, groups: Sequence[Group], reason: DropReason) -> None:
        drops = [
            Drop(
                group_id=group.group_id,
                reason=reason,
                then=what_then(group, reason, max_attempts=self._settings.max_attempts),
            )
            for group in groups
        ]
        if drops:
            self._commit(drops)
        for group in groups:
            self._leases.end(group.group_id)

    def _assign(self, step: int, rho: float | None) -> bool:
        """Choose and log the batch of `step`, which the learner takes at version `step` - 1."""
        now_version, bound = step - 1, self._settings.max_staleness
        finished = self._ledger.in_state(GroupState.FINISHED)
        self._drop([group for group in finished.values() if _age(group, now_version) > bound], DropReason.STALE)
        chosen = select_batch(
            [Candidate(version=group.version, order=group.order, group_id=key) for key, group in finished.items()],
            leased_versions=[lease.version for lease in self._leases],
            version=now_version,
            size=self._settings.groups_per_step,
            max_staleness=bound,
        )
        if chosen is None:
            return False
        for key in chosen:
            if (age := _age(finished[key], now_version)) > bound:
                raise StaleGroupError(
                    f"group {key} is {counted(age, 'step')} old at step {step}, at most {bound} are allowed"
                )
        self._commit([Assign(incarnation=self._incarnation, step=step, groups=chosen, rho=rho)])
        self._unpublished[step] = len(chosen)
        return True


def _age(group: Group, version: int) -> int:
    """Learner steps between the group's oldest policy or hint token and `version` (§6)."""
    return 0 if group.min_version is None else version - group.min_version
