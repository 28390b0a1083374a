from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.env.branch import branch_point
from rexrag.types import Turn

PROMPT = 10
TURNS = [
    Turn(start=10, end=30, action="search", action_start=22),
    Turn(start=50, end=70, action="malformed", action_start=None),
    Turn(start=80, end=100, action="answer", action_start=95),
]


def fork(
    turns: list[Turn],
    *,
    branch: Literal["answer", "turn"] = "answer",
    max_turns: int = 5,
    max_turn_tokens: int = 40,
    max_trajectory_tokens: int = 400,
    longest_hint: int = 8,
) -> int | None:
    return branch_point(
        turns,
        branch=branch,
        prompt_length=PROMPT,
        length=turns[-1].end if turns else PROMPT,
        max_turns=max_turns,
        max_turn_tokens=max_turn_tokens,
        max_trajectory_tokens=max_trajectory_tokens,
        longest_hint=longest_hint,
    )


def test_a_wrong_answer_forks_before_its_own_tag() -> None:
    assert fork(TURNS) == 95
    assert fork(TURNS, branch="turn") == 80


def test_a_turn_without_an_action_forks_at_its_start() -> None:
    assert fork(TURNS[:2]) == 50


def test_the_turn_budget_leaves_one_search_and_one_answer_turn() -> None:
    assert fork(TURNS, max_turns=3) == 95, "turns 2 and 3 of 0..3"
    assert fork(TURNS, max_turns=2) == 50, "turn 2 would be the last one"
    assert fork(TURNS, max_turns=1) == 22
    assert fork(TURNS, max_turns=0) is None


def test_kept_tokens_hint_and_room_fit_the_turn() -> None:
    # turn 2 keeps 15 tokens; hint 20; room 40 // 8 = 5
    assert fork(TURNS, longest_hint=20) == 95
    assert fork(TURNS, longest_hint=21) == 50
    assert fork(TURNS, longest_hint=36) is None


def test_everything_kept_hint_and_a_turn_fit_the_trajectory() -> None:
    assert fork(TURNS, max_trajectory_tokens=95 + 8 + 40) == 95
    assert fork(TURNS, max_trajectory_tokens=95 + 8 + 40 - 1) == 50
    assert fork(TURNS, max_trajectory_tokens=60) is None


def test_no_turn_no_branch() -> None:
    assert fork([]) is None


@st.composite
def rollouts(draw: st.DrawFn) -> list[Turn]:
    turns, at = [], PROMPT
    for _ in range(draw(st.integers(1, 5))):
        end = at + draw(st.integers(1, 30))
        has_action = draw(st.booleans())
        start = draw(st.integers(at, end - 1)) if has_action else None
        turns.append(Turn(start=at, end=end, action="search" if has_action else "malformed", action_start=start))
        at = end + draw(st.integers(0, 20))
    return turns


@settings(deadline=None)
@given(
    turns=rollouts(),
    max_turns=st.integers(0, 6),
    max_turn_tokens=st.integers(1, 60),
    max_trajectory_tokens=st.integers(32, 300),
    longest_hint=st.integers(1, 30),
)
def test_budgets_hold_at_the_branch_and_at_no_later_candidate(
    turns: list[Turn], max_turns: int, max_turn_tokens: int, max_trajectory_tokens: int, longest_hint: int
) -> None:
    fitting = [
        position
        for index, turn in enumerate(turns)
        for position in [turn.start if turn.action_start is None else turn.action_start]
        if max_turns - index >= 1
        and max_turn_tokens - (position - turn.start) - longest_hint >= max(1, max_turn_tokens // 8)
        and max_trajectory_tokens - position - longest_hint >= max_turn_tokens
    ]
    found = fork(
        turns,
        max_turns=max_turns,
        max_turn_tokens=max_turn_tokens,
        max_trajectory_tokens=max_trajectory_tokens,
        longest_hint=longest_hint,
    )
    assert found == (max(fitting) if fitting else None)


@pytest.mark.parametrize(("branch", "expected"), [("answer", 12), ("turn", 10)])
def test_a_first_turn_can_fork(branch: Literal["answer", "turn"], expected: int) -> None:
    assert fork([Turn(start=10, end=30, action="answer", action_start=12)], branch=branch) == expected
