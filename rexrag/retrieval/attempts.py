"""A search as attempts, with pauses between them and outages waited for; all of it within a bound."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from copy import copy

from rexrag.errors import QueryRefusedError, RetrieverError, RetrieverSetupError, counted
from rexrag.retrieval.backoff import longest_search_s, pause_bound_s
from rexrag.retrieval.breaker import MAX_FAILURES_IN_A_ROW, Breaker
from rexrag.retrieval.outages import Outages
from rexrag.retrieval.protocol import RetrieverState
from rexrag.types import Passage

PROBE_QUERY = "test"


class RetryableError(Exception):
    """A failure that may pass: connection, time-out, 5xx, 429.

    Attributes:
        retry_after_s: seconds after which the back end wants to be asked again, where it says so.
        is_busy: it answers, but has no room for this query now: no outage.
        is_elsewhere: another part of it answers: no outage, and the next attempt needs no pause.
        is_late: it did not answer in time.
        is_broken: it answered that it broke at what it was asked (500).
        is_told: another search has failed with it, in the same request: it counts once.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        is_busy: bool = False,
        is_elsewhere: bool = False,
        is_late: bool = False,
        is_broken: bool = False,
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.is_busy = is_busy
        self.is_elsewhere = is_elsewhere
        self.is_late = is_late
        self.is_broken = is_broken
        self.is_told = False

    @classmethod
    def late(cls, timeout_s: float, *, is_elsewhere: bool = False) -> RetryableError:
        """No answer within a time."""
        return cls(f"no answer within {timeout_s:g} s", is_elsewhere=is_elsewhere, is_late=True)

    def of_another(self) -> RetryableError:
        """The same, for another search of the same request."""
        other = copy(self)
        other.is_told = True
        return other


class Attempts:
    """The attempts of all searches at one back end; one instance belongs to one event loop.

    A back end that fails some times in a row is left alone: searches wait, each up to `max_wait_s`, while one probe at
    a time asks whether it is back.

    Args:
        name: of the back end, in messages.
        attempt: one attempt at a query, bounded by `timeout_s`; raises `RetryableError` where the failure may pass.
        timeout_s: bound of one attempt as a whole, seconds.
        max_retries: attempts after the first.
        is_patient: whether outages are waited for; else a search has its attempts, and that is it.
    """

    def __init__(
        self,
        name: str,
        *,
        attempt: Callable[[str, int], Awaitable[Sequence[Passage]]],
        timeout_s: float,
        max_retries: int,
        is_patient: bool = True,
    ) -> None:
        self._name = name
        self._attempt = attempt
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._num_retried = 0
        self._jitter = random.Random()
        self._outages = Outages(
            name,
            breaker=Breaker(max_failures=MAX_FAILURES_IN_A_ROW if is_patient else None),
            probe=lambda: attempt(PROBE_QUERY, 1),
            is_silence=lambda error: isinstance(error, RetryableError) and not error.is_busy,
        )

    @property
    def max_wait_s(self) -> float:
        """Bound of a whole `search`, seconds: all attempts and all pauses between them."""
        return longest_search_s(timeout_s=self._timeout_s, max_retries=self._max_retries)

    async def search(self, query: str, top_k: int) -> Sequence[Passage]:
        """The passages of the first attempt that is answered.

        Raises:
            QueryRefusedError, RetrieverSetupError: as the attempt.
            RetrieverError: every attempt failed, or the back end did not answer for as long as a search may take.
        """
        began = time.monotonic()
        latest = began + self.max_wait_s - self._timeout_s  # an attempt that begins then ends within the bound
        failure = "other searches failed"
        for attempt in range(self._max_retries + 1):
            if not await self._outages.wait(until=latest):
                waited_s = time.monotonic() - began
                raise RetrieverError(f"{self._name} did not answer for {waited_s:.3g} s, at last with: {failure}")
            if time.monotonic() > latest + self._timeout_s / 2:
                raise RetrieverError(f"{self._name} failed {counted(attempt, 'time')}, at last with: {failure}")
            self._num_retried += attempt > 0
            asked_at = time.monotonic()
            try:
                passages = await self._attempt(query, top_k)
            except RetryableError as error:
                failure = str(error)
                self._note(error, began=asked_at)
                if attempt < self._max_retries and not error.is_elsewhere:
                    await self._pause(attempt, until=latest, wanted_s=error.retry_after_s)
            except (QueryRefusedError, RetrieverSetupError):
                self._outages.succeeded(began=asked_at)
                raise
            else:
                self._outages.succeeded(began=asked_at)
                return passages
        raise RetrieverError(f"{self._name} failed {counted(self._max_retries + 1, 'time')}, at last with: {failure}")

    def state(self) -> RetrieverState:
        outages = self._outages
        return RetrieverState(
            is_down=outages.is_open, outages=outages.outages, outage_s=outages.outage_s, retried=self._num_retried
        )

    async def close(self) -> None:
        await self._outages.close()

    def _note(self, error: RetryableError, *, began: float) -> None:
        if error.is_busy:
            self._outages.succeeded(began=began)
        elif not (error.is_elsewhere or error.is_told):
            self._outages.failed(error, began=began)

    async def _pause(self, attempt: int, *, until: float, wanted_s: float | None) -> None:
        """After a failed attempt; where the back end says how long, at least that. Not beyond the search's bound."""
        pause_s = (wanted_s or 0.0) + self._jitter.uniform(0.0, pause_bound_s(attempt))
        await asyncio.sleep(max(0.0, min(pause_s, until - time.monotonic())))
