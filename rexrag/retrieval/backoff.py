"""How long a search may take: attempts, and growing pauses between them. Pure: settings are checked by it."""

from __future__ import annotations

from typing import Final

FIRST_S: Final = 0.25
MOST_S: Final = 10.0


def pause_bound_s(attempt: int) -> float:
    """Exponential back-off with full jitter: the pause after the i-th attempt is uniform below this."""
    return min(MOST_S, FIRST_S * 2.0 ** min(attempt, 30))


def longest_search_s(*, timeout_s: float, max_retries: int) -> float:
    """Bound of a whole search: all attempts and all pauses between them."""
    return (max_retries + 1) * timeout_s + sum(pause_bound_s(attempt) for attempt in range(max_retries))
