"""Where a row could have been forked, and how likely a target forks there and fails: J, D and φ of §4.

Legend: N rows, D decompositions of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from rexrag.env.branch import Branch, branch_positions
from rexrag.hints import HintPool
from rexrag.types import Kind, Trajectory

Place = tuple[int, int]
"""(turn, the token before the position): what φ is estimated by."""

DECAY: Final = 0.8
"""What a step's counts are worth a step later: φ follows the policy within a few steps."""
PRIOR: Final = 0.5
"""Pseudo-counts of forking and of not forking (Jeffreys): a place never seen has φ = 1/2, one never forked at φ > 0."""


@dataclass(frozen=True)
class BranchPosition:
    """A position before which a row could have been forked: the index of the token that the hint would replace."""

    position: int
    turn: int


def branch_places(trajectory: Trajectory, *, branch: Branch) -> Iterator[BranchPosition]:
    """J(y): of each turn its start, and with `answer` all positions up to its action's first token or its end."""
    starts, actions = trajectory.turn_starts.tolist(), trajectory.action_starts.tolist()
    for turn, position in branch_positions(starts, actions, branch=branch):
        yield BranchPosition(position, turn)


@dataclass(frozen=True)
class Decomposition:
    """A hint of the pool that stands in a row where it could have been inserted."""

    at: BranchPosition
    hint_id: int


def decompositions(trajectory: Trajectory, *, hints: HintPool, branch: Branch) -> list[Decomposition]:
    """D(y): of a target as of a probe, for a target may reflect in a hint's words by itself."""
    places = {at.position: at for at in branch_places(trajectory, branch=branch)}
    has_density = trajectory.has_density
    return [
        Decomposition(places[position], hint_id)
        for position, hint_id in hints.find(trajectory.token_ids)
        if position in places and has_density[position : position + len(hints.ids(hint_id))].all()
    ]


@dataclass
class BranchRates:
    """φ_j, the probability that a target that wrote y_≤j forks at j and fails, from the run's own targets.

    Counted by turn and by the token before the position: whether an action begins hangs on it more than on the
    number of tokens before. Lifecycle: `observe` a step's targets, then ask `phi`; `table` goes into checkpoints.
    """

    counts: dict[Place, tuple[float, float]] = field(default_factory=dict)
    """Place -> (positions seen, of these forked at and failed), decayed."""

    def observe(self, targets: Sequence[Trajectory], *, branch: Branch) -> None:
        """Count a step's targets; masked ones must be left out."""
        fresh: dict[Place, tuple[float, float]] = {}
        for target in targets:
            assert target.kind is Kind.TARGET, "only targets fork"
            fork = None if target.branch_point is None or target.correct else target.prompt_length + target.branch_point
            for at in branch_places(target, branch=branch):
                place = place_of(target, at)
                seen, forked = fresh.get(place, (0.0, 0.0))
                fresh[place] = (seen + 1.0, forked + (at.position == fork))
        old = {place: (DECAY * seen, DECAY * forked) for place, (seen, forked) in self.counts.items()}
        self.counts = _added(old, fresh)

    def table(self) -> list[tuple[int, int, float, float]]:
        """Rows (turn, token, seen, forked)."""
        return [(*place, *counts) for place, counts in self.counts.items()]

    @classmethod
    def of_table(cls, table: Iterable[tuple[int, int, float, float]]) -> BranchRates:
        return cls({(turn, token): (seen, forked) for turn, token, seen, forked in table})

    def phi(self, trajectory: Trajectory, at: BranchPosition) -> float:
        """φ at a position of any row, in (0, 1)."""
        seen, forked = self.counts.get(place_of(trajectory, at), (0.0, 0.0))
        return (forked + PRIOR) / (seen + 2.0 * PRIOR)


def place_of(trajectory: Trajectory, at: BranchPosition) -> Place:
    return at.turn, int(trajectory.token_ids[at.position - 1])


def _added(
    a: Mapping[Place, tuple[float, float]], b: Mapping[Place, tuple[float, float]]
) -> dict[Place, tuple[float, float]]:
    none = (0.0, 0.0)
    total = {}
    for place in a.keys() | b.keys():
        (seen_a, forked_a), (seen_b, forked_b) = a.get(place, none), b.get(place, none)
        total[place] = (seen_a + seen_b, forked_a + forked_b)
    return dict(sorted(total.items()))
