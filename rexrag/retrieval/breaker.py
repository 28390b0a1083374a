"""Whether a search back end is up, from how its calls end: the breaker that all episodes of an actor share. Pure.

    closed ──`max_failures` in a row──▶ open ──probe, back-off, probe … ──▶ a success ──▶ closed
      ▲ a success resets the count        no call but the probe is made

Times are seconds of any clock that does not go back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from rexrag.retrieval.backoff import pause_bound_s

MAX_FAILURES_IN_A_ROW: Final = 5


def _full_jitter(bound_s: float) -> float:
    return random.uniform(0.0, bound_s)


class Breaker:
    """Counts failures in a row, opens, and says when to probe.

    Args:
        max_failures: that many in a row open it; None: it never opens.
        jitter: a pause below a bound, so that the probes of many actors do not come at once.
    """

    def __init__(
        self, *, max_failures: int | None = MAX_FAILURES_IN_A_ROW, jitter: Callable[[float], float] = _full_jitter
    ) -> None:
        self._max_failures = max_failures
        self._jitter = jitter
        self._in_a_row = 0
        self._opened_at: float | None = None
        self._num_probes = 0
        self._outages = 0
        self._closed_outages_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._opened_at is not None

    @property
    def outages(self) -> int:
        """Times that it has opened."""
        return self._outages

    def outage_s(self, now: float) -> float:
        """Seconds that it has been open, all outages together, the present one up to now."""
        return self._closed_outages_s + (0.0 if self._opened_at is None else now - self._opened_at)

    def failed(self, now: float) -> bool:
        """A call failed; whether that has just opened it. While it is open failures say nothing new."""
        if self._opened_at is not None:
            return False
        self._in_a_row += 1
        if self._max_failures is None or self._in_a_row < self._max_failures:
            return False
        self._opened_at = now
        self._num_probes = 0
        self._outages += 1
        return True

    def succeeded(self, now: float) -> float | None:
        """A call was answered; the seconds of the outage that ends with it, None where there was none."""
        self._in_a_row = 0
        if self._opened_at is None:
            return None
        lasted_s = now - self._opened_at
        self._closed_outages_s += lasted_s
        self._opened_at = None
        return lasted_s

    def next_pause_s(self) -> float:
        """How long to wait before the next probe: below a bound that doubles with each."""
        assert self.is_open, "only what does not answer is probed"
        self._num_probes += 1
        return self._jitter(pause_bound_s(self._num_probes - 1))
