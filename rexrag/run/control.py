"""The run's end of its control: says how the run is, and hears what is wanted, between two looks of a wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Generic

import ray
from ray.exceptions import RayError

from rexrag.buffer.replay_actor import ReplayActor
from rexrag.buffer.status import BufferStatus
from rexrag.reporting.reporter import Reporter
from rexrag.run.control_actor import RunControl, Wanted, run_name
from rexrag.run.fleet import Fleet
from rexrag.run.remote import Handle, Ref, T, call
from rexrag.run.status import RunStatus

LOG = logging.getLogger(__name__)

EXCHANGE_EVERY_S: Final = 1.0


class Desk:
    """Exchanges with the control actor about once a second, and never waits for it.

    desk = Desk(control, run_folder=run.root, num_steps=16, reporter=reporter, fleet=fleet, buffer=buffer,
                retriever="bm25", on_scale=lambda num_actors: None)
    with desk.waiting("the run waits for the learner's step 3"):
        wanted = desk.look()
    """

    def __init__(
        self,
        control: Handle[RunControl],
        *,
        run_folder: Path,
        num_steps: int,
        reporter: Reporter,
        fleet: Fleet,
        buffer: Handle[Any],
        retriever: str,
        on_scale: Callable[[int], None],
    ) -> None:
        """
        Args:
            on_scale: told the number of actors that is asked for.
        """
        self._control = control
        self._run_folder = run_folder
        self._num_steps = num_steps
        self._reporter = reporter
        self._fleet = fleet
        self._buffer = buffer
        self._retriever = retriever
        self._on_scale = on_scale
        self._waits: list[tuple[str | Callable[[], str], float]] = []
        self._exchange: _Pending[Wanted] = _Pending()
        self._buffer_status: _Pending[BufferStatus] = _Pending()
        self._told: dict[str, object] | None = None
        self._revision = 0
        self._num_finished = 0
        self._is_lost = False

    @contextmanager
    def waiting(self, what: str | Callable[[], str]) -> Iterator[None]:
        """The run waits for something while the block runs."""
        self._waits.append((what, time.monotonic()))
        try:
            yield
        finally:
            self._waits.pop()

    def look(self) -> Wanted | None:
        """What is wanted, where that is new."""
        try:
            if (told := self._buffer_status.value()) is not None:
                self._told = _counts(told)
                if told.num_finished > self._num_finished:
                    self._fleet.progressed()  # in whatever the run waits for
                self._num_finished = told.num_finished
            wanted = self._exchange.value()
            if self._exchange.is_due(EXCHANGE_EVERY_S):
                self._buffer_status.ask(call(self._buffer, ReplayActor.status))
                self._exchange.ask(call(self._control, RunControl.exchange, self.status()))
        except RayError as error:
            if not self._is_lost:
                LOG.warning("the run goes on, but nobody can ask for its status or scale it: %s", error)
            self._is_lost = True
            return None
        self._is_lost = self._is_lost and wanted is None
        if wanted is None or wanted.revision == self._revision:
            return None
        self._revision = wanted.revision
        if wanted.num_actors is not None:
            self._on_scale(wanted.num_actors)
        return wanted

    def status(self) -> RunStatus:
        """The run now."""
        told = self._reporter.told
        what, since = self._waits[0] if self._waits else (None, time.monotonic())
        return RunStatus(
            name=run_name(self._run_folder),
            run_folder=str(self._run_folder),
            stage=told.stage,
            step=told.step,
            num_steps=self._num_steps,
            waiting=what() if callable(what) else what,
            waiting_s=round(time.monotonic() - since, 1),
            metrics=dict(told.metrics),
            evaluations=dict(told.evaluations),
            num_wanted=self._fleet.num_wanted,
            actors=self._fleet.describe(),
            buffer=self._told,
            retriever=self._retriever,
        )


class _Pending(Generic[T]):
    """A call of which at most one is on its way."""

    def __init__(self) -> None:
        self._ref: Ref[T] | None = None
        self._asked_at = 0.0

    def is_due(self, every_s: float) -> bool:
        return self._ref is None and time.monotonic() - self._asked_at >= every_s

    def ask(self, ref: Ref[T]) -> None:
        if self._ref is None:
            self._ref, self._asked_at = ref, time.monotonic()

    def value(self) -> T | None:
        """The answer, once.

        Raises:
            RayError: whoever was asked died.
        """
        if self._ref is None or not ray.wait([self._ref], timeout=0)[0]:
            return None
        ref, self._ref = self._ref, None
        value: T = ray.get(ref)
        return value


def _counts(status: BufferStatus) -> dict[str, object]:
    published = None if status.published is None else status.published.step
    plain = asdict(status)
    del plain["actors"]
    return {**plain, "published": published}
