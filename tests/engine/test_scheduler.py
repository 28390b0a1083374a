"""The scheduler against a cache of plain lists: what a pass reads must be there, of this salt, token for token."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rexrag.engine.kv_cache import attention_runs
from rexrag.engine.protocol import GenerateRequest
from rexrag.engine.scheduler import LiveSequence, Scheduler, StepPlan
from rexrag.engine.slots import PrefixEntry, SlotTable, common_prefix

NUM_SLOTS = 3
PREFILL_TOKENS = 6

Cell = tuple[str, int, int]
"""Salt, token, and which invalidation it was computed after."""


class Simulation:
    """Runs plans as the engine does, over slots that are lists of cells."""

    def __init__(self, num_slots: int = NUM_SLOTS, prefill_tokens: int = PREFILL_TOKENS) -> None:
        self.scheduler = Scheduler(num_slots=num_slots, prefill_tokens=prefill_tokens)
        self.cache: list[list[Cell]] = [[] for _ in range(num_slots)]
        self.age = 0
        self.computed = 0
        self.finished: list[LiveSequence] = []

    def add(
        self, prompt_ids: list[int], *, salt: str = "s", max_tokens: int = 1, score_from: int | None = None
    ) -> LiveSequence:
        request = GenerateRequest(
            prompt_ids=prompt_ids, max_tokens=max_tokens, cache_salt=salt, score_from=score_from, seed=len(prompt_ids)
        )
        sequence = LiveSequence.of(request)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        for copy in plan.copies:
            self.cache[copy.target] = self.cache[copy.source][: copy.length]
        slots = [span.sequence.slot for span in plan.spans]
        assert len(set(slots)) == len(slots)
        for span in plan.spans:
            sequence, salt = span.sequence, span.sequence.request.cache_salt
            expected = [(salt, token, self.age) for token in sequence.token_ids]
            held = self.cache[sequence.slot]
            assert held[: span.start] == expected[: span.start]
            self.cache[sequence.slot] = expected[: span.end]
            self.computed += span.end - span.start
            self.scheduler.advance(span)
            if span.completes:
                self._sample(sequence, first=span.start)
        return plan

    def _sample(self, sequence: LiveSequence, *, first: int) -> None:
        if sequence.wants_scores and sequence.request.score_from is not None:
            assert first <= sequence.request.score_from - 1
        sequence.token_ids.append(len(sequence.token_ids) % 3)
        sequence.logprobs.append(-1.0)
        if len(sequence.logprobs) == sequence.request.max_tokens:
            self.scheduler.finish(sequence)
            self.finished.append(sequence)

    def run(self) -> None:
        while self.step().spans:
            pass


def test_the_prompt_of_a_group_is_computed_once() -> None:
    simulation = Simulation(num_slots=8, prefill_tokens=16)
    prompt = list(range(40))
    for _ in range(5):
        simulation.add(prompt, max_tokens=1)
    simulation.run()
    assert simulation.computed == 40 + 4
    assert simulation.scheduler.reused_tokens == 4 * 39


def test_a_continuation_takes_the_slot_over_and_a_fork_copies() -> None:
    simulation = Simulation()
    first = simulation.add([1, 2, 3, 4], max_tokens=2)
    simulation.run()
    continued = simulation.add([*first.token_ids, 7, 7])
    fork = simulation.add([*first.token_ids[:3], 8, 8])
    plan = simulation.step()
    assert continued.slot == first.slot
    assert [(copy.source, copy.target, copy.length) for copy in plan.copies] == [(first.slot, fork.slot, 3)]
    assert [(span.start, span.end) for span in plan.spans] == [(5, 8), (3, 5)]


def test_salts_share_nothing() -> None:
    simulation = Simulation()
    simulation.add([1, 2, 3], salt="a")
    simulation.run()
    simulation.add([1, 2, 3], salt="b")
    simulation.run()
    assert simulation.computed == 6
    assert simulation.scheduler.reused_tokens == 0


def test_release_forgets_a_salt_alone() -> None:
    simulation = Simulation()
    for salt in "ab":
        simulation.add([1, 2, 3], salt=salt)
    simulation.run()
    simulation.scheduler.release("a")
    for salt in "ab":
        simulation.add([1, 2, 3], salt=salt)
    simulation.run()
    assert simulation.scheduler.reused_tokens == 2


def test_slots_go_to_the_first_comer_and_the_oldest_prefix_makes_room() -> None:
    simulation = Simulation(num_slots=2)
    sequences = [simulation.add([10 + i] * 3, salt=str(i), max_tokens=1 + i % 2) for i in range(7)]
    simulation.run()
    order = [sequences.index(sequence) for sequence in simulation.finished]
    assert sorted(order) == list(range(7))
    assert all(abs(place - index) <= 1 for place, index in enumerate(order))
    simulation.add([16] * 3, salt="6")
    simulation.add([10] * 3, salt="0")
    simulation.run()
    assert simulation.scheduler.reused_tokens == 2


def test_decoding_goes_on_beside_a_long_prefill() -> None:
    simulation = Simulation()
    simulation.add([1], max_tokens=20)
    simulation.step()
    simulation.add([2] * 30, salt="long")
    for _ in range(5):
        assert [span.end - span.start for span in simulation.step().spans] == [1, PREFILL_TOKENS]


def test_tokens_that_are_scored_are_computed_together() -> None:
    simulation = Simulation()
    simulation.add([1] * 20, score_from=9)
    assert [[(s.start, s.end) for s in simulation.step().spans] for _ in range(3)] == [[(0, 6)], [(6, 8)], [(8, 20)]]


def test_followers_of_a_cancelled_sequence_share_among_themselves() -> None:
    simulation = Simulation(num_slots=4)
    leader, *followers = [simulation.add([1] * 20) for _ in range(4)]
    simulation.step()
    simulation.scheduler.drop(leader)
    simulation.run()
    assert simulation.finished == followers
    assert simulation.computed == 6 + 20 + 2


def test_after_invalidation_all_is_computed_again_but_shared_prefixes_once() -> None:
    simulation = Simulation(num_slots=4, prefill_tokens=100)
    for _ in range(3):
        simulation.add([1] * 20, max_tokens=5)
    simulation.step()
    simulation.step()
    simulation.scheduler.invalidate()
    simulation.age += 1
    before = simulation.computed
    simulation.run()
    assert len(simulation.finished) == 3
    # 21 or 22 tokens of the first, one of each other, then what is left to sample.
    assert simulation.computed - before < 22 + 3 * 5


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of requests, continuations, forks, cancellations, releases and weight changes."""

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation()
        self.live: list[LiveSequence] = []

    def _add(self, ids: list[int], salt: str, max_tokens: int, scored: int | None) -> None:
        score_from = None if scored is None else 1 + scored % len(ids)
        self.live.append(self.simulation.add(ids, salt=salt, max_tokens=max_tokens, score_from=score_from))

    @rule(
        ids=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        salt=st.sampled_from("ab"),
        max_tokens=st.integers(1, 4),
        scored=st.none() | st.integers(0, 20),
    )
    def ask(self, ids: list[int], salt: str, max_tokens: int, scored: int | None) -> None:
        self._add(ids, salt, max_tokens, scored)

    @precondition(lambda self: self.simulation.finished)
    @rule(
        which=st.integers(0, 5),
        cut=st.integers(0, 5),
        more=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        scored=st.none() | st.integers(0, 20),
    )
    def go_on_or_fork(self, which: int, cut: int, more: list[int], scored: int | None) -> None:
        finished = self.simulation.finished
        parent = finished[-1 - which % len(finished)]
        kept = parent.token_ids[: max(1, len(parent.token_ids) - cut)]
        self._add([*kept, *more], parent.request.cache_salt, 2, scored)

    @rule(num=st.integers(1, 4))
    def step(self, num: int) -> None:
        for _ in range(num):
            self.simulation.step()
        self._forget_finished()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 10))
    def cancel(self, which: int) -> None:
        self.simulation.scheduler.drop(self.live.pop(which % len(self.live)))

    @rule(salt=st.sampled_from("ab"))
    def release(self, salt: str) -> None:
        self.simulation.scheduler.release(salt)

    @rule()
    def change_weights(self) -> None:
        self.simulation.scheduler.invalidate()
        self.simulation.age += 1

    @invariant()
    def all_slots_are_accounted_for(self) -> None:
        scheduler = self.simulation.scheduler
        slots = [sequence.slot for sequence in scheduler._running]
        assert len(set(slots)) == len(slots) <= NUM_SLOTS
        assert scheduler.num_running + scheduler.num_waiting == len(self.live)

    def teardown(self) -> None:
        self.simulation.run()
        self._forget_finished()
        assert not self.live

    def _forget_finished(self) -> None:
        self.live = [sequence for sequence in self.live if sequence not in self.simulation.finished]


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def test_a_taken_slot_is_never_given_twice() -> None:
    table = SlotTable(2)
    assert [table.take(), table.take(), table.take()] == [0, 1, None]
    table.retain(1, PrefixEntry(salt="s", token_ids=[1, 2]))
    assert table.take(keep=1) is None
    assert table.longest_match("s", [1, 5]) == (1, 1)
    assert table.take() == 1


@given(st.lists(st.integers(0, 1), max_size=8), st.lists(st.integers(0, 1), max_size=8))
@settings(deadline=None)
def test_common_prefix(first: list[int], second: list[int]) -> None:
    length = common_prefix(first, second)
    assert first[:length] == second[:length]
    assert first[: length + 1] != second[: length + 1] or length == min(len(first), len(second))


@given(st.dictionaries(st.integers(0, 63), st.integers(1, 900), min_size=1))
@settings(deadline=None)
def test_attention_runs_cover_every_row_and_cost_no_more_than_one_call(lengths: dict[int, int]) -> None:
    slots = sorted(lengths)
    runs = attention_runs(slots, [lengths[slot] for slot in slots])
    assert all(end <= first for (_, end, _), (first, _, _) in pairwise(runs))
    for slot in slots:
        assert any(first <= slot < end and lengths[slot] <= longest for first, end, longest in runs)
    assert len(runs) <= len(slots)


@pytest.mark.parametrize(("slots", "expected"), [([0, 1, 2], [(0, 3, 9)]), ([0, 60], [(0, 1, 9), (60, 61, 9)])])
def test_neighbours_are_served_together_and_distant_slots_apart(
    slots: list[int], expected: list[tuple[int, int, int]]
) -> None:
    assert attention_runs(slots, [9] * len(slots)) == expected
