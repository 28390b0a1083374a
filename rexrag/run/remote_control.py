"""The control of a run from another process: which run is meant, where its Ray is, and calls that have a bound."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from rexrag.errors import ConfigError, RunFailure, first_line
from rexrag.run.control_actor import CONTROL_NAME, RunControl, is_short_for, run_name
from rexrag.run.joining import joined
from rexrag.run.remote import Handle, Ref, T, call
from rexrag.run.status import RunStatus
from rexrag.run_folder import RunFolder

ANSWER_TIMEOUT_S: Final = 20.0
_LATEST: Final = Path("runs/latest")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where to look for a run.

    Attributes:
        name: None: the one that is there.
        is_named: whether the name is the user's own, of which no run folder is here.
        is_noted: whether the address is what the run has written down while it went on.
    """

    address: str
    name: str | None
    is_named: bool = False
    is_noted: bool = False


def find_place(run: str | None, *, address: str | None) -> Place:
    """Which run is meant by a user's words, and the cluster that it should be in.

    Args:
        run: a run folder, or the name or the end of the name of a run; None: the only one there is.
        address: of the cluster; None: what the run folder says, else RAY_ADDRESS, else the newest run of this folder,
            else the Ray of this machine.

    Raises:
        ConfigError: the run does not go on, or the address is none.
    """
    asked = address or os.environ.get("RAY_ADDRESS")
    if run is not None and RunFolder.is_run(Path(run)):
        folder = RunFolder(Path(run))
        noted = _noted(folder)
        if noted is None and (asked is None or asked.startswith(("http://", "https://"))):
            if folder.is_in_use():
                raise ConfigError(f"--run {run}: is being started, and says nothing yet; ask again in a while")
            status = folder.record().status
            why = "it was killed" if status == "running" else f"it is {status}"
            raise ConfigError(f"--run {run}: does not go on ({why}); start it with: rexrag train --run-dir {run}")
        is_noted = address is None and noted is not None
        return Place(address=address or noted or asked or "auto", name=run_name(folder.root), is_noted=is_noted)
    if run is not None and Path(run).is_dir():
        raise ConfigError(f"--run {run}: is a folder without a run (no run.json); name a run folder.")
    if run is None and asked is None and RunFolder.is_run(_LATEST) and (noted := _noted(RunFolder(_LATEST))):
        return Place(address=noted, name=run_name(RunFolder(_LATEST).root), is_noted=True)
    return Place(address=asked or "auto", name=run, is_named=run is not None)


def _noted(folder: RunFolder) -> str | None:
    """The Ray that a run goes on in, where its folder says so."""
    try:
        return str(json.loads(folder.cluster.read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class RemoteRun:
    """A run that goes on. Each call is bounded.

    Raises:
        RunFailure: by each method: the run ended meanwhile, or does not answer.
    """

    def __init__(self, name: str, control: Handle[RunControl]) -> None:
        self.name = name
        self._control = control

    def status(self) -> RunStatus:
        """What the run said last; a run that has just begun says it within a second or two."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while (told := self._answer(lambda: call(self._control, RunControl.status))) is None:
            if time.monotonic() > deadline:
                raise RunFailure(f"run {self.name}: has said nothing of itself within {ANSWER_TIMEOUT_S:.0f} s")
            time.sleep(0.2)
        return told

    def scale(self, num_actors: int, *, now: bool) -> None:
        self._answer(lambda: call(self._control, RunControl.scale, num_actors, now=now))

    def stop(self) -> None:
        self._answer(lambda: call(self._control, RunControl.stop))

    def _answer(self, ask: Callable[[], Ref[T]]) -> T:
        """What the control says; asked again while Ray starts it anew, which changes nothing that is wanted twice."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                value: T = ray.get(ask(), timeout=ANSWER_TIMEOUT_S)
                return value
            except ActorUnavailableError as error:
                if time.monotonic() > deadline:
                    raise RunFailure(
                        f"run {self.name}: its control is not there for {ANSWER_TIMEOUT_S:.0f} s ({first_line(error)})"
                    ) from error
                time.sleep(0.5)
            except GetTimeoutError:
                raise RunFailure(
                    f"run {self.name}: its control did not answer within {ANSWER_TIMEOUT_S:.0f} s"
                ) from None
            except RayError as error:
                raise RunFailure(f"run {self.name}: ended meanwhile ({first_line(error)})") from error


@contextmanager
def remote_run(place: Place) -> Iterator[RemoteRun]:
    """The run that is meant, over a Ray that is joined while the block runs.

    Raises:
        ConfigError: no such cluster, or no such run in it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(joined(place.address))
        except ConfigError as error:
            if place.is_noted:
                raise RunFailure(f"run {place.name}: ended meanwhile, or was killed: {error}") from error
            if place.is_named:
                raise ConfigError(f"--run {place.name}: is no run folder here, and {error}") from error
            raise
        namespace = _chosen(_running(), place)
        yield RemoteRun(namespace, _control_of(namespace))


def _control_of(name: str) -> Handle[RunControl]:
    try:
        control: Handle[RunControl] = ray.get_actor(CONTROL_NAME, namespace=name)
    except (ValueError, RayError) as error:
        raise RunFailure(f"run {name}: ended meanwhile ({first_line(error)})") from error
    return control


def _running() -> list[str]:
    """The names of the runs that go on in this cluster."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["namespace"] for actor in named if actor["name"] == CONTROL_NAME)


def _chosen(running: Sequence[str], place: Place) -> str:
    if place.name is None:
        if len(running) == 1:
            return running[0]
        if not running:
            raise ConfigError(f"no run goes on in the cluster at {place.address}; start one with: rexrag train")
        raise ConfigError(f"several runs go on: {', '.join(running)}; name one with --run")
    fitting = [name for name in running if name == place.name] or [
        name for name in running if is_short_for(place.name, name)
    ]
    if len(fitting) != 1:
        there = ", ".join(running) or "none"
        raise ConfigError(f"--run {place.name}: no run of this name goes on in the cluster; there: {there}")
    return fitting[0]
