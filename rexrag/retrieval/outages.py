"""Outages of a search back end, waited for: while it does not answer it is probed, and nobody else asks it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from rexrag.errors import counted
from rexrag.retrieval.breaker import Breaker

LOG = logging.getLogger(__name__)


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

    def failed(self, error: Exception) -> None:
        """A call had no answer."""
        if self._breaker.failed(time.monotonic()):
            LOG.warning("%s does not answer: searches wait, and no new questions are begun (%s)", self._name, error)
            self._is_up.clear()
            if self._probing is None or self._probing.done():  # it may still sleep, from an outage just before
                self._probing = asyncio.create_task(self._probe_until_up())

    def succeeded(self) -> None:
        """A call was answered, with whatever."""
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
            try:
                await self._probe()
            except Exception as error:  # noqa: BLE001  # whatever it says is for the searches to see, which then go on
                if self._is_silence(error):
                    LOG.info("%s: %s without an answer, the last: %s", self._name, counted(num_probes, "probe"), error)
                    continue
            self.succeeded()
