"""Where a probe forks a failed rollout (§2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rexrag.types import Turn

Branch = Literal["answer", "turn"]


def branch_positions(
    turn_starts: Sequence[int], action_starts: Sequence[int], *, branch: Branch
) -> list[tuple[int, int]]:
    """J of §4, all (turn, position) at which a row could have been forked, in order.

    Of each turn its start, and with `answer` what follows up to its action's first token, its end where it has none.
    """
    return [
        (turn, position)
        for turn, (start, last) in enumerate(zip(turn_starts, action_starts, strict=True))
        for position in range(start, start + 1 if branch == "turn" else last + 1)
    ]


def branch_point(
    turns: Sequence[Turn],
    *,
    branch: Branch,
    prompt_length: int,
    length: int,
    max_turns: int,
    max_turn_tokens: int,
    max_trajectory_tokens: int,
    longest_hint: int,
) -> int | None:
    """The token before which a probe forks, counted from the start of the trajectory; None: it cannot be probed.

    One candidate per turn: the first token of its action's opening tag, or the turn's start where it has no
    action (always, with `branch = "turn"`). The last one counts for which

    - the forked turn and one more are within the max_turns + 1 turns of a trajectory, to search and to answer;
    - kept tokens of the turn, longest hint, and an eighth of `max_turn_tokens` (at least one token) to go on
      with fit `max_turn_tokens`;
    - everything kept, longest hint, and a full turn fit `max_trajectory_tokens`.

    It does not ask whether the rollout failed, so a right one tells where it would have been forked (§5).

    Args:
        turns: all model turns, in order; positions are in [prompt_length, length].
        longest_hint: tokens of the longest hint of the pool.
    """
    room = max(1, max_turn_tokens // 8)
    for index, turn in reversed(list(enumerate(turns))):
        position = turn.start if branch == "turn" or turn.action_start is None else turn.action_start
        assert prompt_length <= turn.start <= position <= length
        turns_fit = index + 2 <= max_turns + 1
        turn_fits = position - turn.start + longest_hint + room <= max_turn_tokens
        trajectory_fits = position + longest_hint + max_turn_tokens <= max_trajectory_tokens
        if turns_fit and turn_fits and trajectory_fits:
            return position
    return None
