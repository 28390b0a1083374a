"""The search actors of a run: started before all who search, looked after, ended with the run.

Ray starts one that dies again by itself, and its searches go to the others meanwhile; here it is told.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from rexrag.errors import PartDiedError, RunFailure
from rexrag.processes import Share, in_words
from rexrag.retrieval.search_actor import SearchActor, is_restarting, search_actor_name, start_search_actor
from rexrag.retrieval.settings import SearchActorSettings
from rexrag.run.remote import Handle, Ref, call, is_done, is_done_in, kill, result_of
from rexrag.run.signals import StopSignal

LOG = logging.getLogger(__name__)

PING_EVERY_S: Final = 2.0
MAX_LOST_PINGS: Final = 3
"""Pings in a row that say that an actor is gone for good: its process ended before it was built."""


class SearchPool:
    """Search actors over one index folder; none with a `num_actors` of 0."""

    def __init__(self, settings: SearchActorSettings, *, num_actors: int, share: Share) -> None:
        self._share = share
        self._actors = [start_search_actor(number, settings, share=share) for number in range(num_actors)]
        self._pids: dict[int, int] = {}
        self._lost = dict.fromkeys(range(num_actors), 0)
        self._pings = {number: call(actor, SearchActor.ready) for number, actor in enumerate(self._actors)}
        self._pinged_at = time.monotonic()
        self.num_replaced = 0

    @property
    def actors(self) -> list[Handle[SearchActor]]:
        return self._actors

    def await_ready(self, *, timeout_s: float, stop: StopSignal) -> None:
        """Wait until every actor has opened its index.

        Raises:
            UserError: what keeps one from it.
            RunFailure: one has not in `timeout_s` seconds, or died.
            Interrupted: a stop signal came.
        """
        until = time.monotonic() + timeout_s
        for number, ping in self._pings.items():
            what = f"the run waits for {search_actor_name(number)} to open its index"
            if not is_done_in(ping, timeout_s=until - time.monotonic(), what=what, stop=stop):
                raise RunFailure(
                    f"search actor {search_actor_name(number)} has not opened its index in {timeout_s:.0f} s "
                    f"(train.stall_timeout_s): it waits for a node with {in_words(self._share.bundle)} free, or "
                    "loads its encoder"
                )
            self._pids[number] = result_of(ping, what=what)
        self._pings = {}

    def look(self) -> None:
        """Tell of actors that died and are back; cheap, for use all the time.

        Raises:
            UserError: what keeps one from coming back.
            PartDiedError: one does not come back.
        """
        for number, ping in list(self._pings.items()):
            if is_done(ping):
                del self._pings[number]
                self._hear(number, ping)
        if time.monotonic() - self._pinged_at >= PING_EVERY_S:
            self._pinged_at = time.monotonic()
            for number, actor in enumerate(self._actors):
                if number not in self._pings:
                    self._pings[number] = call(actor, SearchActor.ready)

    def stop(self) -> None:
        for actor in self._actors:
            kill(actor)

    def _hear(self, number: int, ping: Ref[int]) -> None:
        name = search_actor_name(number)
        try:
            pid = result_of(ping, what=f"search actor {name}")
        except PartDiedError as error:
            if not is_restarting(error.__cause__):
                self._lost[number] += 1
            if self._lost[number] >= MAX_LOST_PINGS:
                raise
            return
        self._lost[number] = 0
        if pid != self._pids[number]:
            self._pids[number] = pid
            self.num_replaced += 1
            LOG.warning("search actor %s died and is back; its searches were made again", name)
