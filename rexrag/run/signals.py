"""SIGINT and SIGTERM: at once while a run is prepared, between steps and checkpointed while it trains."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from rexrag.errors import Interrupted

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """What came in, as a flag that waits look at.

    `graceful` is off at first: a signal then raises KeyboardInterrupt where the program is, which no handler of errors
    on the way takes for one. When it is on, the first signal only sets `received`, and a second one raises.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._graceful = False

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        """Handle the signals while the block runs, then restore what was there.

        Raises:
            Interrupted: the block was left at once.
        """
        old = {number: signal.getsignal(number) for number in _SIGNALS}
        self._install()
        try:
            yield self
        except KeyboardInterrupt:
            raise Interrupted(self._left_at_once()) from None
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def be_graceful(self) -> None:
        """From now on a stop waits for its moment. Takes the handlers back from whoever set others meanwhile."""
        self._graceful = True
        self._install()

    def heed(self, where: str = "") -> None:
        """Where the program may end.

        Args:
            where: completes the sentence "stopped by ...".

        Raises:
            Interrupted: a stop came.
        """
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received}{where}")

    def ask(self, by: str) -> None:
        """A stop that came on another way than a signal; it waits for its moment like one."""
        if self.received is None:
            self.received = by

    def _left_at_once(self) -> str:
        if self._graceful:
            return "left at once, by a second signal; what came after the last checkpoint will be done again"
        return "stopped before training began; what has been prepared is kept"

    def _install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None or not self._graceful:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
