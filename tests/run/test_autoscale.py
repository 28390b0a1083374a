"""The number of actors follows who waits for whom, both ways, and comes to rest."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rexrag.run.autoscale import WINDOW_STEPS, Autoscaler, StepLoad

shares = st.floats(0.0, 1.0)


def play(scaler: Autoscaler, *, start: int, groups_per_actor: float, needed: float, steps: int) -> list[int]:
    """Actors that each make so many groups in the time of a step, and a learner that takes so many."""
    wanted, numbers = start, []
    for _ in range(steps):
        made = wanted * groups_per_actor
        wait = max(0.0, 1.0 - made / needed)
        fill = 0.9 if made > needed else 0.1
        wanted = scaler.decide(StepLoad(wait_share=wait, fill=fill, num_ready=wanted, num_wanted=wanted, capacity=999))
        numbers.append(wanted)
    return numbers


def test_it_grows_until_the_learner_hardly_waits_and_then_rests() -> None:
    numbers = play(Autoscaler(least=1, most=64), start=1, groups_per_actor=1.0, needed=10.0, steps=60)
    assert numbers[0] == numbers[1] == 1, "a decision looks at several steps"
    assert numbers[-1] == 8, "two of ten groups too few: the learner waits a fifth of a step"
    assert set(numbers[-20:]) == {8}
    assert numbers == sorted(numbers)


def test_it_shrinks_where_actors_wait_and_stops_before_the_learner_does() -> None:
    numbers = play(Autoscaler(least=1, most=64), start=30, groups_per_actor=1.0, needed=10.0, steps=90)
    assert numbers[-1] == 10
    assert set(numbers[-20:]) == {10}


def test_actors_that_are_still_to_come_are_waited_for() -> None:
    scaler = Autoscaler(least=1, most=64)
    assert {
        scaler.decide(StepLoad(wait_share=1.0, fill=0.0, num_ready=1, num_wanted=4, capacity=999)) for _ in range(9)
    } == {4}


def test_there_are_never_more_actors_than_groups_for_them() -> None:
    scaler = Autoscaler(least=1, most=64)
    wanted = 8
    for _ in range(9):
        wanted = scaler.decide(StepLoad(wait_share=1.0, fill=0.0, num_ready=wanted, num_wanted=wanted, capacity=9))
    assert wanted == 9
    load = StepLoad(wait_share=1.0, fill=0.0, num_ready=20, num_wanted=20, capacity=9)
    assert {scaler.decide(load) for _ in range(9)} == {20}, "those that were asked for from outside stay"


def test_a_number_outside_the_bounds_comes_back_into_them() -> None:
    scaler = Autoscaler(least=2, most=4)
    assert scaler.decide(StepLoad(wait_share=0.1, fill=0.2, num_ready=9, num_wanted=9, capacity=999)) == 4
    assert scaler.decide(StepLoad(wait_share=0.1, fill=0.2, num_ready=1, num_wanted=1, capacity=999)) == 2


@given(st.lists(st.tuples(shares, shares), max_size=60), st.integers(1, 9), st.integers(0, 9))
def test_it_stays_within_its_bounds_and_moves_at_most_once_in_a_window(
    loads: list[tuple[float, float]], least: int, room: int
) -> None:
    scaler, wanted, moves = Autoscaler(least=least, most=least + room), least, []
    for step, (wait, fill) in enumerate(loads):
        before = wanted
        wanted = scaler.decide(StepLoad(wait_share=wait, fill=fill, num_ready=before, num_wanted=before, capacity=999))
        assert least <= wanted <= least + room
        if wanted != before:
            moves.append(step)
    assert all(later - earlier >= WINDOW_STEPS for earlier, later in itertools.pairwise(moves))
