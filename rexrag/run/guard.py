"""Whether a run collapses, from its own metrics: what it was rewarded for is lost, and the policy no longer writes as
it did. Pure.

One bad step is noise, and on its way out of a dead end a policy may be wrong for some steps: a trip needs the mean of
several steps, compared with the best that the run has had, and a second sign.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        self._num_steps = 0
        self._num_rewards = 0
        self._window: deque[Metrics] = deque(maxlen=WINDOW)
        self._rewards: deque[float] = deque(maxlen=WINDOW)
        self._best = 0.0
        self._best_window: Sequence[Metrics] = ()
        self._in_a_row = 0
        for metrics in history:
            self._note(metrics)

    def look(self, step: int, metrics: Metrics) -> Trip | None:
        """The collapse that a step shows; None: there is none."""
        self._note(metrics)
        if self._num_steps < WINDOW + LEAST_HISTORY:
            return None
        fallen = self._fallen()
        signs = [] if fallen is None else self._signs()
        self._in_a_row = self._in_a_row + 1 if signs else 0
        if fallen is None or self._in_a_row < LASTS:
            return None
        return Trip(step=step, first_bad=step - WINDOW + 1, reasons=(fallen, *signs))

    def _note(self, metrics: Metrics) -> None:
        """Keep the last window, and the one in which the reward was best, the later of equals."""
        self._num_steps += 1
        self._window.append(metrics)
        reward = metrics.get(keys.TARGET_REWARD)
        if reward is None:
            return
        self._num_rewards += 1
        self._rewards.append(reward)
        if len(self._rewards) == WINDOW and (not self._best_window or self._mean >= self._best):
            self._best, self._best_window = self._mean, tuple(self._window)

    @property
    def _mean(self) -> float:
        return statistics.fmean(self._rewards)

    def _fallen(self) -> str | None:
        """What is said of a reward that is lost; None where it is not."""
        if self._num_rewards <= WINDOW or self._mean >= FALL * self._best or self._best - self._mean < LEAST_FALL:
            return None
        return f"{keys.TARGET_REWARD} over {WINDOW} steps is {self._mean:.2f}, at best it was {self._best:.2f}"

    def _signs(self) -> list[str]:
        found = []
        for sign in SIGNS:
            now, then = _median(self._window, sign.metric), _median(self._best_window, sign.metric)
            if now is not None and then is not None and sign.is_bad(now, then):
                found.append(f"{sign.metric} is {now:.3g}, at best {then:.3g}")
        return found


def _median(seen: Iterable[Metrics], metric: str) -> float | None:
    values = [value for one in seen if (value := one.get(metric)) is not None]
    return statistics.median(values) if values else None
