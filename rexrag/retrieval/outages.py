"""Outages of a search back end, waited for: while it does not answer it is probed, and nobody else asks it.

What a call that fails says is of the time when it began: the calls of a process that died may fail only when its
successor has answered others, and then they tell of no outage.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable

from rexrag.errors import counted
from rexrag.retrieval.breaker import Breaker

LOG = logging.getLogger(__name__)


class LatestAnswered:
    """When the latest of the answered calls began, by `time.monotonic`."""

    def __init__(self) -> None:
        self._began = -math.inf

    def note(self, began: float) -> None:
        """A call that began then was answered."""
        self._began = max(self._began, began)

    def is_after(self, began: float) -> bool:
        """Whether a call that began later than that has been answered."""
        return self._began > began


class Outages:
    """A breaker, the probes of one back end, and those who wait for it. One instance belongs to one event loop.

    Args:
        name: of the back end, for the log, which is told when an outage begins and when it ends.
        probe: asks it something.
        is_silence: whether an error of `probe` means that it does not answer; any other is an answer.
    """

    def __init__(
        self,
        name: str,
        *,
        breaker: Breaker,
        probe: Callable[[], Awaitable[object]],
        is_silence: Callable[[Exception], bool],
    ) -> None:
        self._name = name
        self._breaker = breaker
        self._probe = probe
        self._is_silence = is_silence
        self._answered = LatestAnswered()
        self._is_up = asyncio.Event()
        self._is_up.set()
        self._probing: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._breaker.is_open

    @property
    def outages(self) -> int:
        return self._breaker.outages

    @property
    def outage_s(self) -> float:
        return self._breaker.outage_s(time.monotonic())

    async def wait(self, *, until: float) -> bool:
        """Wait while the back end does not answer; whether it does.

        Args:
            until: at which time of `time.monotonic` to give up.
        """
        if self._is_up.is_set():
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until - time.monotonic()):
                await self._is_up.wait()
        return self._is_up.is_set()

    def failed(self, error: Exception, *, began: float) -> None:
        """A call had no answer.

        Args:
            began: when it was made, by `time.monotonic`.
        """
        if not self._answered.is_after(began) and self._breaker.failed(time.monotonic()):
            LOG.warning("%s does not answer: searches wait, and no new questions are begun (%s)", self._name, error)
            self._is_up.clear()
            if self._probing is None or self._probing.done():  # it may still sleep, from an outage just before
                self._probing = asyncio.create_task(self._probe_until_up())

    def succeeded(self, *, began: float) -> None:
        """A call was answered, with whatever."""
        self._answered.note(began)
        lasted_s = self._breaker.succeeded(time.monotonic())
        if lasted_s is not None:
            LOG.warning("%s answers again, after %.1f s", self._name, lasted_s)
            self._is_up.set()

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    async def _probe_until_up(self) -> None:
        num_probes = 0
        while self._breaker.is_open:
            await asyncio.sleep(self._breaker.next_pause_s())
            num_probes += 1
            began = time.monotonic()
            try:
                await self._probe()
            except Exception as error:  # noqa: BLE001  # whatever it says is for the searches to see, which then go on
                if self._is_silence(error):
                    LOG.info("%s: %s without an answer, the last: %s", self._name, counted(num_probes, "probe"), error)
                    continue
            self.succeeded(began=began)
