"""Whether a run collapses, from its own metrics: what it was rewarded for is lost, and the policy no longer writes as
it did. Pure.

One bad step is noise, and on its way out of a dead end a policy may be wrong for some steps: a trip needs the mean of
several steps, compared with the best that the run has had, and a second sign.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import rexrag.metrics as keys

Metrics = Mapping[str, float | None]

WINDOW: Final = 5
"""Steps over which the reward is averaged; a trip lies in the last of them."""
LEAST_HISTORY: Final = 3
"""Steps before the window that a comparison needs."""
FALL: Final = 0.6
"""Share of its best mean reward under which a run has lost it."""
LASTS: Final = 2
"""Steps in a row that have to look like that."""
LEAST_FALL: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class _Sign:
    """How a metric looks when a policy breaks. `is_bad`: of its median now and when the reward was best."""

    metric: str
    is_bad: Callable[[float, float], bool]


SIGNS: Final = (
    _Sign(metric=keys.POLICY_CORRECT_LOGPROB, is_bad=lambda now, before: now < 1.5 * before - 0.05),
    _Sign(metric=keys.GRAD_NORM, is_bad=lambda now, before: now > 10.0 * before > 0.0),
    _Sign(metric=keys.WEIGHT_ESS_TARGET, is_bad=lambda now, before: now < before / 3.0),
    _Sign(metric=keys.POLICY_ENTROPY, is_bad=lambda now, before: not before / 2.0 <= now <= 2.0 * before),
    _Sign(metric=keys.TARGET_VALID_ACTION_RATE, is_bad=lambda now, before: now < before - 0.1),
    _Sign(metric=keys.TARGET_SEARCHES, is_bad=lambda now, before: not before / 1.7 <= now <= 1.7 * before),
    _Sign(metric=keys.TARGET_LIMIT_RATE, is_bad=lambda now, before: now > before + 0.15),
    _Sign(metric=keys.TARGET_REFLECT_RATE, is_bad=lambda now, before: now > before + 0.5),
)
"""What users of this kind of training see before they see the reward fall, or beside it."""


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A collapse. `first_bad`: the first step of the window; `reasons`: what was seen, in words."""

    step: int
    first_bad: int
    reasons: tuple[str, ...]


class Guard:
    """Looks at one step after the other.

        guard = Guard()
        trip = guard.look(7, {"target/reward": 0.01, "target/valid_action_rate": 0.2})

    Args:
        history: metrics of the steps before.
    """

    def __init__(self, history: Sequence[Metrics] = ()) -> None:
        self._seen: list[Metrics] = list(history)
        self._in_a_row = 0

    def look(self, step: int, metrics: Metrics) -> Trip | None:
        """The collapse that a step shows; None: there is none."""
        self._seen.append(metrics)
        if len(self._seen) < WINDOW + LEAST_HISTORY:
            return None
        fallen, best_end = self._fallen()
        signs = [] if fallen is None else self._signs(best_end)
        self._in_a_row = self._in_a_row + 1 if signs else 0
        if fallen is None or self._in_a_row < LASTS:
            return None
        return Trip(step=step, first_bad=step - WINDOW + 1, reasons=(fallen, *signs))

    def _fallen(self) -> tuple[str | None, int]:
        """What is said of a reward that is lost, None where it is not; and where its best window ended."""
        known = [
            (end, value)
            for end, seen in enumerate(self._seen, 1)
            if (value := seen.get(keys.TARGET_REWARD)) is not None
        ]
        if len(known) <= WINDOW:
            return None, 0
        means = [
            (statistics.fmean(value for _, value in known[last - WINDOW : last]), known[last - 1][0])
            for last in range(WINDOW, len(known) + 1)
        ]
        now, (best, best_end) = means[-1][0], max(means)
        if now >= FALL * best or best - now < LEAST_FALL:
            return None, best_end
        return f"{keys.TARGET_REWARD} over {WINDOW} steps is {now:.2f}, at best it was {best:.2f}", best_end

    def _signs(self, best_end: int) -> list[str]:
        window, best = self._seen[-WINDOW:], self._seen[:best_end][-WINDOW:]
        found = []
        for sign in SIGNS:
            now, then = _median(window, sign.metric), _median(best, sign.metric)
            if now is not None and then is not None and sign.is_bad(now, then):
                found.append(f"{sign.metric} is {now:.3g}, at best {then:.3g}")
        return found


def _median(seen: Sequence[Metrics], metric: str) -> float | None:
    values = [value for one in seen if (value := one.get(metric)) is not None]
    return statistics.median(values) if values else None
