"""Waiting with a bound: on progress, not on the whole."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rexrag.errors import PartDiedError, RunFailure
from rexrag.run.signals import StopSignal
from rexrag.run.supervisor import Supervisor


def make_supervisor(stall_timeout_s: float) -> Supervisor:
    fleet = cast("Any", SimpleNamespace(check=lambda: None))
    return Supervisor(fleet=fleet, parts={}, stop=StopSignal(), stall_timeout_s=stall_timeout_s)


def test_a_wait_without_progress_ends_and_says_what_it_is_for_by_then() -> None:
    seen = [0]

    def is_done() -> bool:
        seen[0] += 1
        return False

    with pytest.raises(
        RunFailure, match=r"looked (?!1 )\d+ times: no progress in 0 s; .* larger train\.stall_timeout_s"
    ):
        make_supervisor(0.4).until(is_done, what=lambda: f"looked {seen[0]} times", pause_s=0.02)


def test_the_death_of_a_part_is_not_that_of_whom_one_waits_for() -> None:
    """An evaluation would take it for an actor's, and go on."""

    def look() -> None:
        raise PartDiedError("search actor search-0: its process died")

    supervisor = make_supervisor(9.0)
    supervisor._pool = cast("Any", SimpleNamespace(look=look))
    with pytest.raises(RunFailure, match="search-0: its process died") as raised:
        supervisor.look()
    assert type(raised.value) is RunFailure
    supervisor.end()
    supervisor.look()


def test_a_wait_with_progress_goes_on() -> None:
    started = time.monotonic()
    make_supervisor(0.4).until(
        lambda: time.monotonic() - started > 1.5, what="never told", progress=time.monotonic, pause_s=0.02
    )
