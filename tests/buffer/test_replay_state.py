from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from replay_helpers import Clock, ListJournal, fold, make_group, make_ipc, make_questions, make_settings, restart

from rexrag.arrow import group_from_ipc, group_to_ipc
from rexrag.buffer.ledger import GroupState
from rexrag.buffer.questions import PackedQuestions
from rexrag.buffer.records import Assign, Issue
from rexrag.buffer.schedule import Candidate, issue_order, select_batch
from rexrag.errors import DataError, UnknownLeaseError
from rexrag.types import GroupLease, LeaseKey, WeightVersion


class Rig:
    """A buffer over a journal in memory, with weights of step 0 published."""

    def __init__(self, **changes: float) -> None:
        self.settings = make_settings(Path("unused"), **changes)
        self.clock, self.journal = Clock(), ListJournal()
        self.state = restart(self.settings, self.journal, clock=self.clock, incarnation="1", resume_step=0)
        self.publish(0)

    def publish(self, step: int) -> None:
        self.version = WeightVersion(incarnation="run", step=step)
        self.state.publish(self.version)

    def lease(self, num: int, actor: str = "a") -> list[GroupLease]:
        return self.state.lease(actor, num=num, held=self.version)

    def append(self, lease: GroupLease, *, actor: str = "a", versions: tuple[int, ...] | None = None) -> str:
        return self.state.append(actor, lease=lease.key, ipc=make_ipc(lease, versions=versions))

    def step(self, step: int) -> tuple[str, ...]:
        """Take, consume and publish a step; its group ids."""
        assert self.state.assign(step, rho=None)
        batch = self.state.take(step)
        self.state.outcome(step, applied=True)
        self.publish(step)
        return tuple(group_from_ipc(ipc).group_id for ipc in batch.groups)

    def state_of(self, group_id: str) -> GroupState:
        return fold(self.journal.records).groups[group_id].state


def test_a_group_lives_from_lease_to_consumption() -> None:
    rig = Rig(groups_per_step=2)
    first, second = rig.lease(2)
    assert (first.group_id, second.group_id, first.attempt, first.epoch) == ("1-0", "1-1", 0, 0)
    ipc = make_ipc(first)
    assert rig.state.append("a", lease=LeaseKey("1-0", 1), ipc=ipc) == "accepted"
    assert rig.state.append("a", lease=LeaseKey("1-0", 1), ipc=ipc) == "duplicate"
    assert not rig.state.assign(1, rho=0.18)
    rig.append(second)
    assert rig.state.assign(1, rho=0.18)
    batch = rig.state.take(1)
    assert batch.groups[0] == ipc
    assert (batch.step, batch.incarnation) == (1, "1")
    assert Assign(incarnation="1", step=1, groups=("1-0", "1-1"), rho=0.18) in rig.journal.records
    assert rig.state.accounting() == {"issued": 2, "consumed": 0, "dropped": {}, "pending": 2, "given_up": 0}
    rig.state.outcome(1, applied=False)
    assert rig.state.accounting() == {"issued": 2, "consumed": 2, "dropped": {}, "pending": 0, "given_up": 0}


def test_nothing_is_leased_before_the_first_version_or_to_old_weights() -> None:
    settings_ = make_settings(Path("unused"))
    state = restart(settings_, ListJournal(), clock=Clock(), incarnation="1", resume_step=3)
    newest = WeightVersion(incarnation="run", step=3)
    assert state.lease("a", num=1, held=newest) == []
    with pytest.raises(ValueError, match="goes back"):
        state.publish(WeightVersion(incarnation="run", step=2))
    with pytest.raises(ValueError, match="no step with a batch"):
        state.publish(WeightVersion(incarnation="run", step=4))
    state.publish(newest)
    assert state.lease("a", num=1, held=WeightVersion(incarnation="run", step=2)) == []
    assert state.lease("a", num=1, held=WeightVersion(incarnation="older run", step=9)) == []
    assert state.status().actors["a"].waits_for_version
    assert len(state.lease("a", num=1, held=WeightVersion(incarnation="run", step=4))) == 1
    with pytest.raises(ValueError, match="goes back"):
        state.publish(WeightVersion(incarnation="other", step=3))


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_admission_bounds_what_is_under_way(staleness: int) -> None:
    rig = Rig(groups_per_step=2, max_staleness=staleness)
    leases = rig.lease(100)
    assert len(leases) == (staleness + 1) * 2 == rig.state.capacity
    for lease in leases:
        rig.append(lease)
    assert rig.lease(100) == []
    assert rig.state.assign(1, rho=None)
    rig.state.outcome(1, applied=True)
    assert rig.lease(100) == []  # the version that the step makes is not published yet
    rig.publish(1)
    assert len(rig.lease(100)) == 2


def test_groups_are_shared_out_among_the_actors_that_ask() -> None:
    """However many each has room for: one that would take all leaves the others idle."""
    rig = Rig(groups_per_step=4, max_staleness=1, num_questions=50)
    for actor in ("b", "c", "d"):
        rig.state.lease(actor, num=5, held=None)  # they have no weights yet
    shares = {actor: rig.lease(5, actor=actor) for actor in ("a", "b", "c", "d")}
    assert [len(leases) for leases in shares.values()] == [2, 2, 2, 2]
    assert rig.lease(5) == []
    done = [shares["a"][0], shares["b"][0], shares["b"][1], shares["c"][0]]
    for lease, actor in zip(done, "abbc", strict=True):
        rig.append(lease, actor=actor)
    rig.step(1)
    assert len(rig.lease(5, actor="b")) == 2, "who has nothing gets most"
    assert [len(rig.lease(5)), len(rig.lease(5, actor="d"))] == [1, 1], "what is left goes to who asks first"
    assert [len(rig.lease(5, actor=actor)) for actor in ("a", "b", "c", "d")] == [0, 0, 0, 0]


def test_an_actor_whose_fellows_do_not_ask_gets_all_in_the_end() -> None:
    rig = Rig(groups_per_step=4, max_staleness=1)
    rig.state.lease("hung", num=5, held=None)
    assert [len(rig.lease(5)) for _ in range(6)] == [4, 1, 1, 1, 1, 0]


def test_a_silent_lease_goes_to_the_next_actor_under_the_same_id() -> None:
    rig = Rig(lease_timeout_s=10.0)
    lost, kept = rig.lease(2)
    rig.clock.now = 9.0
    assert rig.state.renew("a", progress={lost.key: 0, kept.key: 5}) == []
    rig.clock.now = 12.0
    assert rig.state.renew("a", progress={lost.key: 9, kept.key: 5}) == [lost.key]
    (again, fresh) = rig.lease(2, actor="b")
    assert (again.group_id, again.question, again.attempt) == (lost.group_id, lost.question, 0)
    assert fresh.group_id == "1-2"
    assert rig.append(lost, actor="a") == "accepted"  # the first durable one wins
    assert rig.state.renew("b", progress={again.key: 3, fresh.key: 3}) == [again.key]
    assert rig.append(again, actor="b") == "duplicate"


def test_the_deadline_ends_a_lease_that_still_makes_progress() -> None:
    rig = Rig(lease_timeout_s=10.0, lease_deadline_s=25.0)
    (lease,) = rig.lease(1)
    for now in (8.0, 16.0, 24.0):
        rig.clock.now = now
        assert rig.state.renew("a", progress={lease.key: int(now)}) == []
    rig.clock.now = 25.0
    assert rig.state.renew("a", progress={lease.key: 99}) == [lease.key]


def test_release_frees_the_groups_of_a_dead_actor_only() -> None:
    rig = Rig()
    mine = rig.lease(2, actor="a")
    other = rig.lease(1, actor="b")
    rig.state.release("a")
    rig.state.release("a")
    assert rig.state.renew("b", progress={other[0].key: 1}) == []
    assert [lease.group_id for lease in rig.lease(2, actor="c")] == [lease.group_id for lease in mine]


def test_broken_groups_are_asked_again_and_given_up_in_the_end() -> None:
    rig = Rig(num_questions=2, max_attempts=2, groups_per_step=1)
    (lease,) = rig.lease(1)
    question = lease.question
    for attempt in (1, 2):
        rig.state.fail("a", lease=lease.key, reason="env_error")
        rig.state.fail("a", lease=lease.key, reason="env_error")
        (lease,) = rig.lease(1)
        assert (lease.question, lease.attempt) == (question, attempt)
    assert rig.state.append("a", lease=lease.key, ipc=b"not arrow") == "invalid"
    counts = rig.state.accounting()
    assert (counts["issued"], counts["pending"], counts["given_up"]) == (3, 0, 1)
    assert counts["dropped"] == {"env_error": 2, "invalid": 1}
    assert rig.lease(1)[0].question != question
    with pytest.raises(UnknownLeaseError):
        rig.append(lease)


def test_refilling_drops_groups_without_a_signal_and_asks_other_questions() -> None:
    rig = Rig(groups_per_step=1, refill=True)
    (flat,) = rig.lease(1)
    assert rig.append(flat) == "flat"
    assert (rig.state.status().num_finished, rig.state.status().num_flat) == (0, 1), "no progress of a step"
    assert not rig.state.assign(1, rho=None)
    assert rig.state.accounting() == {"issued": 1, "consumed": 0, "dropped": {"flat": 1}, "pending": 0, "given_up": 0}
    with pytest.raises(UnknownLeaseError, match="was dropped"):
        rig.append(flat)
    (other,) = rig.lease(1)
    assert other.question.key != flat.question.key
    assert rig.state.append("a", lease=other.key, ipc=with_two_rewards(other)) == "accepted"
    assert rig.step(1) == (other.group_id,)
    again = restart(rig.settings, rig.journal, clock=rig.clock, incarnation="2", resume_step=1)
    assert again.accounting()["dropped"] == {"flat": 1}


def with_two_rewards(lease: GroupLease) -> bytes:
    group = make_group(lease.group_id, lease.question.key)
    rows = (group.trajectories[0], replace(group.trajectories[1], reward=0.0))
    return group_to_ipc(replace(group, trajectories=rows))


def test_unknown_groups_and_reasons_are_refused() -> None:
    rig = Rig()
    (lease,) = rig.lease(1)
    with pytest.raises(UnknownLeaseError, match="9-9"):
        rig.state.append("a", lease=LeaseKey("9-9", 1), ipc=make_ipc(lease))
    with pytest.raises(UnknownLeaseError):
        rig.state.fail("a", lease=LeaseKey("9-9", 1), reason="invalid")
    with pytest.raises(ValueError, match="boredom"):
        rig.state.fail("a", lease=lease.key, reason="boredom")
    with pytest.raises(ValueError, match="cannot be assigned: the next one is 1"):
        rig.state.assign(2, rho=None)
    with pytest.raises(ValueError, match="step 1 has no batch"):
        rig.state.take(1)
    with pytest.raises(ValueError, match="has no batch"):
        rig.state.outcome(1, applied=True)


def test_one_actor_cannot_fail_the_group_of_another() -> None:
    rig = Rig()
    (lease,) = rig.lease(1, actor="a")
    rig.state.release("a")
    rig.lease(1, actor="b")
    rig.state.fail("a", lease=lease.key, reason="invalid")
    assert rig.state.append("a", lease=lease.key, ipc=b"") == "invalid"
    assert rig.append(lease, actor="b") == "accepted"


@pytest.mark.parametrize("how", ["fail", "append", "renew", "hand_back"])
def test_an_actor_that_gets_its_own_group_again_keeps_it_whatever_its_first_try_does(how: str) -> None:
    rig = Rig()
    (orphan,) = rig.lease(1)
    rig.clock.now = 10.0
    (live,) = rig.lease(1)
    assert (live.group_id, orphan.grant, live.grant) == (orphan.group_id, 1, 2)
    if how == "fail":
        rig.state.fail("a", lease=orphan.key, reason="env_error")
    elif how == "append":
        assert rig.state.append("a", lease=orphan.key, ipc=b"torn") == "invalid"
    elif how == "hand_back":
        rig.state.hand_back("a", lease=orphan.key)
    rig.clock.now = 19.0
    assert rig.state.renew("a", progress={orphan.key: 99}) == [orphan.key]
    assert rig.state.renew("a", progress={live.key: 1}) == []
    assert rig.append(live) == "accepted"
    assert rig.state.accounting()["dropped"] == {}


def test_a_group_that_is_handed_back_goes_to_others_as_the_same_attempt() -> None:
    rig = Rig()
    (lease,) = rig.lease(1)
    rig.state.hand_back("a", lease=lease.key)
    (again,) = rig.lease(1, actor="b")
    assert (again.group_id, again.attempt, again.grant) == (lease.group_id, 0, 2)
    assert rig.state.accounting()["issued"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_id": "1-1"}, "appended as group 1-0"),
        ({"question": "world/none"}, "appended as group 1-0"),
        ({"versions": (0, 1)}, "tokens of version 1"),
    ],
)
def test_a_group_must_be_what_was_leased(
    change: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig()
    (lease,) = rig.lease(1)
    values: dict[str, object] = {"group_id": lease.group_id, "question": lease.question.key, **change}
    group = make_group(**values)  # type: ignore[arg-type]
    assert rig.state.append("a", lease=lease.key, ipc=group_to_ipc(group)) == "invalid"
    assert message in caplog.text
    assert rig.state.accounting()["dropped"] == {"invalid": 1}


@given(position=st.integers(0, 5000), value=st.integers(0, 255))
@settings(deadline=None, max_examples=150)
def test_damaged_bytes_are_refused_or_a_valid_group(position: int, value: int) -> None:
    rig = Rig()
    (lease,) = rig.lease(1)
    ipc = bytearray(make_ipc(lease))
    ipc[position % len(ipc)] = value
    answer = rig.state.append("a", lease=lease.key, ipc=bytes(ipc))
    expected = {"accepted": GroupState.FINISHED, "invalid": GroupState.DROPPED}
    assert rig.state_of(lease.group_id) is expected[answer]


def test_a_late_group_that_is_too_old_is_dropped_when_it_would_be_consumed() -> None:
    rig = Rig(groups_per_step=1, max_staleness=1, num_questions=3)
    (late,) = rig.lease(1, actor="slow")
    rig.state.release("slow")
    rig.lease(1, actor="hung")  # holds the same group until it is lost
    for step in (1, 2):
        (lease,) = rig.lease(1)
        rig.append(lease)
        if step == 2:
            rig.state.release("hung")
        rig.step(step)
    assert rig.append(late, versions=(0,)) == "accepted"
    assert not rig.state.assign(3, rho=None)
    assert rig.state.accounting()["dropped"] == {"stale": 1}
    (again,) = rig.lease(1)
    assert (again.question, again.attempt) == (late.question, 1)
    assert rig.append(late) == "duplicate"


def test_a_late_group_counts_as_old_as_its_tokens() -> None:
    rig = Rig(groups_per_step=1, num_questions=3)
    (late, quick) = rig.lease(2, actor="slow")
    rig.append(quick, actor="slow")
    rig.step(1)
    rig.state.release("slow")
    (again,) = rig.lease(1)
    assert (again.group_id, again.version.step) == (late.group_id, 1)
    rig.append(late, versions=(0, 1))
    group = fold(rig.journal.records).groups[late.group_id]
    assert (group.version, group.min_version, group.max_version) == (0, 0, 1)


def test_a_step_waits_for_a_slow_group_at_its_last_chance() -> None:
    rig = Rig(groups_per_step=1, max_staleness=1, num_questions=4)
    slow, quick = rig.lease(2)
    rig.append(quick)
    assert rig.step(1) == (quick.group_id,)
    (fresh,) = rig.lease(1)
    rig.append(fresh)
    assert not rig.state.assign(2, rho=None)  # version 0 may be consumed at version 1, and never after
    rig.append(slow)
    assert rig.step(2) == (slow.group_id,)


def test_a_step_waits_no_longer_than_the_lease_of_a_slow_group() -> None:
    rig = Rig(groups_per_step=1, max_staleness=1, num_questions=4)
    _, quick = rig.lease(2)
    rig.append(quick)
    rig.step(1)
    (fresh,) = rig.lease(1)
    rig.append(fresh)
    assert not rig.state.assign(2, rho=None)
    rig.clock.now = 11.0
    assert rig.step(2) == (fresh.group_id,)


def test_questions_are_shuffled_anew_in_each_epoch() -> None:
    keys = [question.key for question in make_questions(20)]
    orders = [issue_order(keys, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == sorted(keys) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert issue_order(reversed(keys), seed=0, epoch=0) == orders[0]


def test_questions_must_exist_and_be_unique() -> None:
    values = make_settings(Path("unused"))
    for questions, message in (((), "no question"), (make_questions(2) * 2, "occurs twice")):
        with pytest.raises(DataError, match=message):
            replace(values, questions=questions)


def simulate(rig: Rig, *, rng: random.Random, num_steps: int, loss_rate: float) -> tuple[Counter[int], int]:
    """Actors of very different speed against a learner; ages of consumed groups, and steps out of admission order.

    A lost lease leaves its actor at work: it may append late, after others had the group.
    """
    work: list[tuple[float, GroupLease]] = []
    ages: Counter[int] = Counter()
    out_of_order, step, now = 0, 0, 0.0
    while step < num_steps:
        now += 1.0
        rig.clock.now = now
        for lease in rig.lease(3, actor=f"actor-{now}"):
            duration = rng.choice([1.0, 2.0, 5.0, 40.0])
            work.append((now + duration, lease))
            if rng.random() < loss_rate:
                rig.state.release(f"actor-{now}")
        for end, lease in [item for item in work if item[0] <= now]:
            work.remove((end, lease))
            rig.append(lease, versions=(lease.version.step, rig.version.step))
        ledger = fold(rig.journal.records)
        finished = sorted((g.order, key) for key, g in ledger.in_state(GroupState.FINISHED).items())
        if not rig.state.assign(step + 1, rho=None):
            continue
        taken = rig.step(step + 1)
        out_of_order += [key for _, key in finished[: len(taken)]] != list(taken)
        ages.update(step - (ledger.groups[key].min_version or 0) for key in taken)
        step += 1
        assert now < 3000.0, rig.state.status()
    return ages, out_of_order


@given(seed=st.integers(0, 10**6), staleness=st.integers(0, 3), groups_per_step=st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_slow_groups_are_neither_dropped_nor_too_old(seed: int, staleness: int, groups_per_step: int) -> None:
    changes = {"max_staleness": staleness, "groups_per_step": groups_per_step, "num_questions": 7}
    rig = Rig(**changes, lease_timeout_s=1e6, lease_deadline_s=1e6)
    ages, out_of_order = simulate(rig, rng=random.Random(seed), num_steps=15, loss_rate=0.0)
    assert rig.state.accounting()["dropped"] == {}
    assert max(ages) <= staleness
    assert out_of_order == 0


@given(seed=st.integers(0, 10**6), staleness=st.integers(0, 3), groups_per_step=st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_lost_leases_cost_groups_but_no_question(seed: int, staleness: int, groups_per_step: int) -> None:
    changes = {"max_staleness": staleness, "groups_per_step": groups_per_step, "num_questions": 5}
    rig = Rig(**changes, max_attempts=100)
    ages, _ = simulate(rig, rng=random.Random(seed), num_steps=15, loss_rate=0.3)
    assert max(ages) <= staleness
    assert set(rig.state.accounting()["dropped"]) <= {"stale"}
    assert_each_question_once(rig)


def assert_each_question_once(rig: Rig) -> None:
    """No (epoch, question) is consumed twice, and none of an epoch that was left is forgotten."""
    ledger = fold(rig.journal.records)
    consumed = Counter((g.epoch, g.question) for g in ledger.in_state(GroupState.CONSUMED).values())
    assert set(consumed.values()) <= {1}
    issued = {(r.epoch, r.question) for r in rig.journal.records if isinstance(r, Issue)}
    assert issued == {*ledger.live, *ledger.again}


def brute_force_wait(
    finished: list[Candidate], leased: list[int], *, version: int, size: int, max_staleness: int
) -> bool:
    """The rule in its own words: some k at which too many would be left behind."""
    left = [candidate.version for candidate in sorted(finished)[size:]] + leased
    return any(sum(lease + max_staleness <= version + k for lease in left) > k * size for k in range(max_staleness + 1))


@given(
    ages=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12),
    size=st.integers(1, 3),
    staleness=st.integers(0, 3),
)
@settings(deadline=None, max_examples=300)
def test_selection_follows_the_rule_where_it_can_be_kept(
    ages: list[tuple[int, bool]], size: int, staleness: int
) -> None:
    version = 10
    rows = sorted((version - min(age, staleness), done) for age, done in ages)[: (staleness + 1) * size]
    finished = [Candidate(version=v, order=i, group_id=str(i)) for i, (v, done) in enumerate(rows) if done]
    leased = [v for v, done in rows if not done]
    feasible = all(sum(v + staleness <= version + k for v, _ in rows) <= (k + 1) * size for k in range(staleness + 1))
    batch = select_batch(finished, leased_versions=leased, version=version, size=size, max_staleness=staleness)
    if len(finished) < size:
        assert batch is None
    elif feasible:
        waits = brute_force_wait(finished, leased, version=version, size=size, max_staleness=staleness)
        assert (batch is None) == waits
    elif not leased:
        assert batch is not None  # waiting would help nobody
    if batch is not None:
        assert list(batch) == [candidate.group_id for candidate in sorted(finished)[:size]]


def test_status_names_who_holds_what() -> None:
    rig = Rig(groups_per_step=2, max_staleness=1)
    first, _ = rig.lease(2, actor="a")
    rig.clock.now = 4.0
    rig.state.renew("a", progress={first.key: 7})
    rig.lease(1, actor="b")
    rig.clock.now = 6.0
    rig.append(first)
    rig.state.release("b")
    status = rig.state.status()
    assert (status.waiting, status.leased, status.finished, status.assigned, status.capacity) == (1, 1, 1, 0, 4)
    assert status.actors["a"].num_leased == 1
    assert status.actors["a"].idle_s == 6.0
    assert "b" not in status.actors
    position = rig.state.position()
    assert (position.incarnation, position.last_step, position.epoch) == ("1", 0, 0)


def test_the_buffer_keeps_its_questions_packed(tmp_path: Path) -> None:
    questions = make_questions(3)
    packed = PackedQuestions(questions)
    assert [packed[question.key] for question in questions] == list(packed.values()) == list(questions)
    slim = make_settings(tmp_path, num_questions=3).without_questions()
    assert (slim.questions, slim.groups_per_step) == ((), 2)
