"""How many rollout actors there should be, by who waits for whom: one decision after each learner step.

The learner waits for groups -> more actors. The buffer is full, so the actors wait -> fewer. Between the two nothing
changes, and after a change the next is not decided before its effect can be seen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

WINDOW_STEPS: Final = 3
"""Steps that a decision looks at, all of them since the last change."""
MORE_ABOVE: Final = 0.25
"""Share of a step in which the learner waits, above which it wants more actors."""
FEWER_BELOW: Final = 0.05
"""The same, below which there may be too many."""
FULL: Final = 0.5
"""Finished groups over what the buffer admits, from which on actors wait for the learner."""
GROWTH: Final = 0.25
"""At most by so much of their number the actors grow at once, at least by one."""


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """Of one step.

    Attributes:
        wait_share: of its time the part in which the learner waited for groups, 0 to 1.
        fill: finished groups that were left in the buffer, over all that it admits, 0 to 1.
        num_ready, num_wanted: actors at work, and that were asked for.
        capacity: groups that may be under way at once: of more actors some have nothing to do.
    """

    wait_share: float
    fill: float
    num_ready: int
    num_wanted: int
    capacity: int


class Autoscaler:
    """Decides within bounds.

    >>> scaler = Autoscaler(least=1, most=8)
    >>> for _ in range(3):
    ...     wanted = scaler.decide(StepLoad(wait_share=0.9, fill=0.0, num_ready=4, num_wanted=4, capacity=96))
    >>> wanted
    5
    """

    def __init__(self, *, least: int, most: int) -> None:
        assert 1 <= least <= most, f"bounds must be 1 <= least <= most, got {least} and {most}"
        self._least = least
        self._most = most
        self._seen: deque[StepLoad] = deque(maxlen=WINDOW_STEPS)

    def decide(self, load: StepLoad) -> int:
        """How many actors to have after a step."""
        now = load.num_wanted
        if not self._least <= now <= self._most:  # asked for from outside
            return min(max(now, self._least), self._most)
        if load.num_ready < now:  # some are still to come: what is seen is not their doing
            self._seen.clear()
            return now
        self._seen.append(load)
        if len(self._seen) < WINDOW_STEPS:
            return now
        wanted = now
        if all(seen.wait_share > MORE_ABOVE for seen in self._seen):
            wanted = max(now, min(self._most, load.capacity, now + max(1, int(GROWTH * now))))
        elif all(seen.wait_share < FEWER_BELOW and seen.fill >= FULL for seen in self._seen):
            wanted = max(self._least, now - 1)
        if wanted != now:
            self._seen.clear()
        return wanted
