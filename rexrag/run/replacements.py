"""When an actor that died is replaced: at once, and later and later where they die soon after their start.

A node that breaks whatever is started on it would else have a new actor every minute, for as long as the others work.
"""

from __future__ import annotations

from typing import Final

SHORT_LIFE_S: Final = 300.0
NUM_AT_ONCE: Final = 2
"""So many short lives in a row are replaced without a pause."""
MAX_PAUSE_S: Final = 300.0


class Replacements:
    """Actors that are to be started, by when. Times are seconds of any clock that does not go back."""

    def __init__(self) -> None:
        self._due: list[float] = []
        self._num_short = 0

    def __len__(self) -> int:
        return len(self._due)

    def ask(self, *, lived_s: float, is_another: bool, now: float) -> float:
        """One has died that was at work for so long; the seconds until another is due, which `take` gives out.

        Args:
            is_another: it did not go together with the one before.
        """
        if lived_s > SHORT_LIFE_S:
            self._num_short = 0
        elif is_another:
            self._num_short += 1
        pause_s = min(MAX_PAUSE_S, 2.0**self._num_short) if self._num_short > NUM_AT_ONCE else 0.0
        self._due.append(now + pause_s)
        return pause_s

    def take(self, now: float) -> int:
        """How many are due; they are not asked for any more."""
        before = len(self._due)
        self._due = [due for due in self._due if due > now]
        return before - len(self._due)

    def keep(self, most: int) -> int:
        """Let go of all but so many, those that are due last first; how many are left."""
        self._due = sorted(self._due)[: max(0, most)]
        return len(self._due)
