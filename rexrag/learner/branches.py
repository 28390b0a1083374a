"""Where a row could have been forked, and how likely a target forks there and fails: J, D and φ of §4.

Legend: N rows, D decompositions of all rows, J positions of a row, P places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rexrag.env.branch import Branch
from rexrag.hints import HintPool
from rexrag.types import Kind, Trajectory

Place = tuple[int, int]
"""(turn, the token before the position): what φ is estimated by."""
Indices = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float64]

DECAY: Final = 0.8
"""What a step's counts are worth a step later: φ follows the policy within a few steps."""
PRIOR: Final = 0.5
"""Pseudo-counts of forking and of not forking (Jeffreys): a place never seen has φ = 1/2, one never forked at φ > 0."""
MIN_SEEN: Final = 1e-3
"""A place seen less than this, once some 30 steps ago, is forgotten: its φ is the prior's but for a thousandth."""
MAX_PLACES: Final = 1 << 16
"""Places that are kept, those seen most: what a step costs does not grow with the run."""

_TOKEN_BITS: Final = 32


@dataclass(frozen=True)
class BranchPosition:
    """A position before which a row could have been forked: the index of the token that the hint would replace."""

    position: int
    turn: int


def branch_places(trajectory: Trajectory, *, branch: Branch) -> tuple[Indices, Indices]:
    """J(y), ascending: of each turn its start, and with `answer` all positions up to its action's first token or end.

    Returns:
        [J] positions and [J] the turns that they are in.
    """
    starts = trajectory.turn_starts.astype(np.int64)
    lasts = starts if branch == "turn" else trajectory.action_starts.astype(np.int64)
    lengths = np.maximum(lasts - starts + 1, 0)
    turns = np.repeat(np.arange(len(starts)), lengths)
    within = np.arange(len(turns)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts[turns] + within, turns


@dataclass(frozen=True)
class Decomposition:
    """A hint of the pool that stands in a row where it could have been inserted."""

    at: BranchPosition
    hint_id: int


def decompositions(trajectory: Trajectory, *, hints: HintPool, branch: Branch) -> list[Decomposition]:
    """D(y): of a target as of a probe, for a target may reflect in a hint's words by itself."""
    positions, turns = branch_places(trajectory, branch=branch)
    has_density = trajectory.has_density
    found = []
    for position, hint_id in hints.find(trajectory.token_ids):
        place = int(np.searchsorted(positions, position))
        is_place = place < len(positions) and positions[place] == position
        if is_place and has_density[position : position + len(hints.ids(hint_id))].all():
            found.append(Decomposition(BranchPosition(position, int(turns[place])), hint_id))
    return found


class BranchRates:
    """φ_j, the probability that a target that wrote y_≤j forks at j and fails, from the run's own targets.

    Counted by turn and by the token before the position: whether an action begins hangs on it more than on the
    number of tokens before. Lifecycle: `observe` a step's targets, then ask `phi`; `table` goes into checkpoints.

    The table is two columns behind ascending keys (turn and token in one number), of at most `MAX_PLACES` rows.
    """

    def __init__(self) -> None:
        self._keys: Indices = np.empty(0, np.int64)
        self._seen: Counts = np.empty(0)
        self._forked: Counts = np.empty(0)

    def __len__(self) -> int:
        return len(self._keys)

    def observe(self, targets: Sequence[Trajectory], *, branch: Branch) -> None:
        """Count a step's targets; masked ones must be left out."""
        keys, forked = [self._keys], [DECAY * self._forked]
        for target in targets:
            assert target.kind is Kind.TARGET, "only targets fork"
            positions, turns = branch_places(target, branch=branch)
            fork = -1 if target.branch_point is None or target.correct else target.prompt_length + target.branch_point
            keys.append(_key(turns, target.token_ids[positions - 1]))
            forked.append((positions == fork).astype(np.float64))
        num_new = sum(map(len, keys)) - len(self._keys)
        seen = np.concatenate([DECAY * self._seen, np.ones(num_new)])
        self._set(np.concatenate(keys), seen, np.concatenate(forked))

    def table(self) -> list[tuple[int, int, float, float]]:
        """Rows (turn, token, seen, forked): positions seen at a place, and of these forked at and failed, decayed."""
        turns, tokens = self._keys >> _TOKEN_BITS, self._keys & ((1 << _TOKEN_BITS) - 1)
        columns = (turns.tolist(), tokens.tolist(), self._seen.tolist(), self._forked.tolist())
        return list(zip(*columns, strict=True))

    @classmethod
    def of_table(cls, table: Iterable[tuple[int, int, float, float]]) -> BranchRates:
        """From the rows of a checkpoint, in any order."""
        rows = np.array([*table], np.float64).reshape(-1, 4)
        rates = cls()
        rates._set(_key(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)), rows[:, 2], rows[:, 3])
        return rates

    def phi(self, trajectory: Trajectory, at: BranchPosition) -> float:
        """φ at a position of any row, in (0, 1)."""
        turn, token = place_of(trajectory, at)
        key = (turn << _TOKEN_BITS) | token
        place = int(np.searchsorted(self._keys, key))
        is_known = place < len(self._keys) and self._keys[place] == key
        seen, forked = (self._seen[place], self._forked[place]) if is_known else (0.0, 0.0)
        return float((forked + PRIOR) / (seen + 2.0 * PRIOR))

    def _set(self, keys: Indices, seen: Counts, forked: Counts) -> None:
        """The table of these entries, of which those with one key are added up, and rare ones dropped."""
        self._keys, place = np.unique(keys, return_inverse=True)
        self._seen = np.bincount(place, weights=seen, minlength=len(self._keys)).astype(np.float64)
        self._forked = np.bincount(place, weights=forked, minlength=len(self._keys)).astype(np.float64)
        kept = np.flatnonzero(self._seen >= MIN_SEEN)
        if len(kept) > MAX_PLACES:  # of equally rare ones those of early turns stay
            kept = np.sort(kept[np.argsort(-self._seen[kept], kind="stable")[:MAX_PLACES]])
        self._keys, self._seen, self._forked = self._keys[kept], self._seen[kept], self._forked[kept]


def place_of(trajectory: Trajectory, at: BranchPosition) -> Place:
    return at.turn, int(trajectory.token_ids[at.position - 1])


def _key(turns: Indices, tokens: npt.NDArray[np.integer]) -> Indices:
    keys: Indices = (turns.astype(np.int64) << _TOKEN_BITS) | tokens.astype(np.int64)
    return keys
