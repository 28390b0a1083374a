"""Pauses before an actor is started in the place of one that died, in virtual time."""

from __future__ import annotations

from rexrag.run.replacements import MAX_PAUSE_S, Replacements


def test_short_lives_in_a_row_are_replaced_later_and_later() -> None:
    replacements, now, pauses = Replacements(), 0.0, []
    for _ in range(12):
        now += 30.0
        pauses.append(replacements.ask(lived_s=20.0, is_another=True, now=now))
        assert replacements.take(now + pauses[-1] - 0.1) == 0 or pauses[-1] == 0
        now += pauses[-1]
        replacements.take(now)
        assert len(replacements) == 0
    assert pauses[:5] == [0.0, 0.0, 8.0, 16.0, 32.0]
    assert pauses[-1] == MAX_PAUSE_S
    assert replacements.ask(lived_s=900.0, is_another=True, now=now + 1000.0) == 0.0, (
        "one that lived long is replaced at once"
    )


def test_those_that_go_together_are_one_death() -> None:
    replacements = Replacements()
    pauses = [replacements.ask(lived_s=9.0, is_another=number == 0, now=50.0 + number) for number in range(9)]
    assert pauses == [0.0] * 9
    assert replacements.take(60.0) == 9


def test_those_that_are_not_wanted_any_more_are_let_go() -> None:
    replacements = Replacements()
    for now in (10.0, 30.0, 50.0, 70.0):
        replacements.ask(lived_s=1.0, is_another=True, now=now)
    assert replacements.take(40.0) == 2
    assert replacements.keep(1) == 1
    assert replacements.take(59.0) == 1, "the one that is due first stays"
    assert replacements.keep(0) == len(replacements) == 0
